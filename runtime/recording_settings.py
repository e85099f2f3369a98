"""What is recorded of the requests that are served (filled from ``conf/serve.yaml``)."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import InputError
from runtime.settings import Settings

MOST_MINUTES = 100_000
MOST_MB = 1_000_000


@dataclass(frozen=True)
class RecordSettings(Settings):
    """What is recorded of the requests that are served.

    Attributes:
        record: path of the traces, ``PATH-0001.safetensors`` and so on; None records nothing.
        record_rate: share of the requests.
        record_max_mb: size of a file in MB at which the next one begins.
        record_minutes: after so long a file is finished, however small.
        record_rotate: finished files that are kept.
        record_token_ids: whether the tokens' ids are recorded too: prompts can be read from them.
        record_seed: of the choice of requests.
    """

    record: str | None = None
    record_rate: float = 0.01
    record_max_mb: float = 256
    record_minutes: float = 60
    record_rotate: int = 8
    record_token_ids: bool = False
    record_seed: int = 0

    def __post_init__(self) -> None:
        if self.record is not None and not (isinstance(self.record, str) and self.record):
            raise InputError(f"record={self.record}: expected a path, as in record=traces/routes")
        for name, most, expected in (
            ("record_rate", 1.0, "a number above 0 and at most 1"),
            ("record_max_mb", MOST_MB, f"a number above 0 and at most {MOST_MB}"),
            ("record_minutes", MOST_MINUTES, f"a number above 0 and at most {MOST_MINUTES}"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise InputError(f"{name}={value}: expected {expected}")
        for name, least in (("record_rotate", 1), ("record_seed", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: expected an integer of at least {least}")
        if not isinstance(self.record_token_ids, bool):
            raise InputError(f"record_token_ids={self.record_token_ids}: expected true or false")
