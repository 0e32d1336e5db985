from stllms.annotation.judge import NO_REPLY, Replay  # noqa: F401
