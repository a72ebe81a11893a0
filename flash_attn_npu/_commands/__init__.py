"""What `flash-attn-npu WORD` and `python -m flash_attn_npu WORD` do: a file for each word.

Each has `add(subparsers)`, which describes it, and `run(options)`, which does it and returns the
exit status. None imports torch before it has to: help and versions are quick, and the doctor is
asked about machines on which torch cannot be imported.
"""

from __future__ import annotations

COMMANDS = ("run", "doctor", "validate", "matrix", "activate", "deactivate", "status")
"""In the order of the help; `run` is meant where no word is given."""
