from stllms.annotation.judge import Judge  # noqa: F401
