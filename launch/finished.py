"""`python -m convnext_yolo.launch.finished --config FILE [--key.sub value]`: is the run done?

For job scripts that start a run again: exit code 0 says that the recipe's last step is published,
1 that there is more to do, 2 that the recipe is wrong.
"""

import sys
from collections.abc import Sequence

from .parser import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers by its exit code."""
    parser = Parser("python -m convnext_yolo.launch.finished", allow_abbrev=False)
    parser.add_argument("--config", action="append", required=True, metavar="FILE")
    options, rest = parser.parse_known_args(arguments)

    from ..recipes.config import RecipeError
    from ..recipes.load import load_recipe, recipe_path
    from ..recipes.resume import is_finished

    try:
        recipe = load_recipe([recipe_path(name) for name in options.config], rest)
    except RecipeError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if is_finished(recipe) else 1


if __name__ == "__main__":
    sys.exit(main())
