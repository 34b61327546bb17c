"""bloomjax: train the next BLOOM in JAX."""

from pathlib import Path

__version__ = "0.1.0"

# In the wheel `tasks/` lies inside the package. In a checkout it lies beside it: both are bloomjax.tasks.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "tasks" / "languages.py").is_file() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
