"""Methods of other families, one package each: MEND.

In a checkout they lie in `baselines/` at the top, in an installed package beside this file. They are registered by name
(`sphere.methods`), never found by scanning.
"""

from pathlib import Path

_checkout = Path(__file__).parents[2] / "baselines"
if (_checkout / "mend" / "method.py").is_file():
    __path__.append(str(_checkout))
