"""Stub: the names of this module still live at their old addresses."""

from stllms.pipeline import (STAGES, REQUIRES, ARTEFACTS, RESUMED, ESTIMATE, LOOK, INSIDE, StageError, notebooks_folder, notebook, stage_named, stages_for, folder_of, check, fresh, renew, code_of, key_of, has_run, failed, is_done, pending, ensure, prepare, release, finish, compared)  # noqa: F401
