"""Old address, deleted at the end."""

from stllms.app.colab import machine  # noqa: F401
