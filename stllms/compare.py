from stllms.app.compare import (members, of_model, of_run)  # noqa: F401
from stllms.comparison.released import (READERS, of_file as of_released, entry_of)  # noqa: F401
