"""The stored replies of a judge as an annotator: no key, no network, the same result.

What was judged is found by what the judge was shown of a chain, so that replies outlive a
change of the prompt around it and of the names of tasks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stllms.annotate import protocols
from stllms.provenance import BadFile, remembered_hash
from stllms.records import Annotation, Response
from stllms.replies import FILE, Reply, Store

NO_REPLY = "no stored reply"


class Replay:
    """Annotates from the folder a judge stored its replies in; ``name`` is ``replay:FOLDER``.

    Where the folder holds several judges, ``model`` and ``protocol`` choose one; without them
    that is a ``ValueError`` that lists them. A chain without a stored reply is a failed
    annotation that says so.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model: str | None = None,
        protocol: str | None = None,
        reader: str = "tolerant",
    ) -> None:
        path = Path(folder).expanduser()
        if not (path / FILE).is_file():
            raise ValueError(f"{path} holds no stored replies: there is no {FILE} in it")
        judged = [
            row
            for row in _rows(Store(path))
            if model in (None, row["model"]) and protocol in (None, row["identity"]["protocol"])
        ]
        judges = sorted({(row["model"], row["identity"]["protocol"]) for row in judged})
        if len(judges) != 1:
            held = "; ".join(f"model={m!r}, protocol={p!r}" for m, p in judges)
            asked = f" for model={model!r}, protocol={protocol!r}" if model or protocol else ""
            raise ValueError(
                f"{path / FILE} holds several judges: choose one of {held}"
                if judges
                else f"{path / FILE} holds no reply of a judge{asked}"
            )
        self.name = f"replay:{folder}"
        self.fingerprint = remembered_hash(path / FILE)[:16]
        self.model = judges[0][0]
        self.protocol = protocols.protocol(judges[0][1], reader)
        self._by_shown: dict[str, list[Mapping[str, Any]]] = {}
        for row in judged:
            self._by_shown.setdefault(row["about"]["shown"], []).append(row)

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation a response, in the same order."""
        made = []
        for response in responses:
            asked = self.protocol.requests(response)
            replies = [self._newest(request.about["shown"]) for request in asked]
            made.append(self.protocol.annotation(response, replies, self.name))
        return made

    def _newest(self, shown: str) -> Reply:
        """The newest answer about a part of a chain, else why there is none."""
        rows = self._by_shown.get(shown, [])
        answered = [row for row in rows if row["status"] != "failed"]
        if answered:
            return Reply(answered[-1])
        return Reply({}, rows[-1]["reason"] if rows else NO_REPLY)


def _rows(store: Store) -> Iterator[Mapping[str, Any]]:
    """The rows that judges wrote; a folder may also hold an API model's responses.

    Raises :class:`~stllms.provenance.BadFile` that names file, line and field where a row does not
    say what the judge was shown.
    """
    for number, row in store.numbered():
        if row["identity"].get("protocol") in protocols.PROTOCOLS:
            if not isinstance(row.get("about", {}).get("shown"), str):
                raise BadFile(
                    f"{store.path}, line {number}: a judge's reply without about.shown, the "
                    "hash of what the judge was shown; mend or delete this line"
                )
            yield row
