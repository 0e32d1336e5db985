from stllms.terminal import (  # noqa: F401
    CHANNEL,
    SHOWN_EVERY,
    WINDOW,
    Bar,
    State,
    about,
    clock,
    followed,
    read,
    report,
    token_bar,
    words,
)
