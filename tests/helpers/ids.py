"""Names of parameters in the names of tests."""

import re


def without_addresses(value: object) -> str:
    """As text, the same in every process: functions and objects would be named by where they lie in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
