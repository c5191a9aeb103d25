"""The options of every command that takes a recipe to train."""

from .parser import Parser

RECIPE_KEYS = """Any key of the recipe is an option, later ones win:
  convnext-yolo {command} --config recipes/quickstart.yaml --optimizer.lr 0.001 --run runs/other
`recipe.yaml` in the run's folder shows every key with its value."""


def add_recipe_options(parser: Parser) -> None:
    """Adds --config and --resume, and lets keys of the recipe through."""
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="recipe, or the name of one that comes with the package; may be given again: "
        "later files win key by key",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): go on from the run's newest checkpoint that verifies, if any",
    )
    parser.set_defaults(takes_recipe_keys=True)
