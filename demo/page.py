"""The pieces of HTML that the page is made of. All text from files and models is escaped here."""

from collections.abc import Sequence
from html import escape

from convnext_yolo.model.weights import WeightsInfo

from .overlay import class_colour
from .results import class_names, describe_model

_LISTED_CLASSES = 8  # a model of more classes names them on request, and counts only those found


def masthead(info: WeightsInfo) -> str:
    """Title, and what the model is."""
    model = describe_model(info)
    facts = {
        "Model": escape(str(model["name"])),
        "Training step": f"{info.step:,}",
        "Classes": _classes(class_names(info)),
        "Input": "{1} × {0} px".format(*info.image_px),
    }
    measured = {key: info.metrics.get(key) for key in ("AP", "AP50")}
    numbers = [f"{key} {v:.3f}" for key, v in measured.items() if isinstance(v, int | float)]
    if numbers:
        facts["Validation"] = " · ".join(numbers)
    if info.sha256:
        facts["Weights"] = f'<code title="{escape(info.sha256)}">{escape(info.sha256[:10])}</code>'
    entries = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    return f'<header class="masthead"><h1>ConvNeXt-YOLO</h1><dl>{entries}</dl></header>'


def _classes(names: Sequence[str]) -> str:
    listed = ", ".join(escape(name) for name in names)
    if len(names) <= _LISTED_CLASSES:
        return listed
    return f"<details><summary>{len(names)} classes</summary><p>{listed}</p></details>"


def empty_stage() -> str:
    """Before the first picture: how to give one."""
    return (
        '<div class="stage invitation"><div class="by-mouse">'
        "<p><strong>Drop a picture here</strong></p>"
        "<p>or paste one with <kbd>Ctrl</kbd> <kbd>V</kbd>, or choose a file.</p></div>"
        '<p class="by-touch"><strong>Tap to choose a picture</strong></p></div>'
    )


def refused_stage(sentence: str) -> str:
    """Instead of a picture: why there is none."""
    return (
        '<div class="stage refusal" role="alert">'
        f"<p><strong>This picture can’t be shown</strong></p><p>{escape(sentence)}</p></div>"
    )


def picture_stage(url: str, width_px: int, height_px: int, overlay: str, alt: str) -> str:
    """The picture with its boxes above it.

    Args:
        url: of the picture as the browser gets it.
        width_px, height_px: size of the picture; the frame has its shape before it is loaded.
        overlay: SVG, already escaped.
        alt: what the picture shows, in words.
    """
    # The frame takes the width there is, as long as it stays lower than the window, and enlarges a
    # small picture, but not a tiny one to a few huge squares.
    shape = f"--ratio:{width_px / height_px:.5f};--own-width:{width_px}px"
    return (
        f'<figure class="stage picture" style="{shape}">'
        f'<img src="{escape(url)}" alt="{escape(alt)}" width="{width_px}" height="{height_px}">'
        f"{overlay}</figure>"
    )


def picture_words(file_name: str, counts: Sequence[int], names: Sequence[str]) -> str:
    """The result in words, for those who don't see the picture."""
    found = ", ".join(f"{count} {name}" for count, name in zip(counts, names, strict=True) if count)
    return f"{file_name} with {found} in boxes" if found else f"{file_name}, nothing found in it"


def counts_table(
    counts: Sequence[int], names: Sequence[str], confidence: float, best_score: float
) -> str:
    """How many boxes of each class; or that there are none, and what could be done.

    Args:
        counts: of each class.
        names: of the classes, in index order.
        confidence: the threshold.
        best_score: of all candidates in the picture, 0 if there are none.
    """
    total = sum(counts)
    if not total:
        near = (
            f"The surest guess has {best_score:.2f}: lower the confidence to see it."
            if best_score > 0
            else "The model has no guess at all, not even an unsure one."
        )
        return (
            '<div class="counts nothing" role="status"><p><strong>Nothing found</strong> '
            f"above confidence {confidence:.2f}.</p><p>{near}</p></div>"
        )
    shown = list(range(len(names)))
    if len(names) > _LISTED_CLASSES:
        shown = sorted((i for i in shown if counts[i]), key=lambda i: -counts[i])
    rows = "".join(
        f'<tr><th scope="row"><span class="swatch" style="background:{class_colour(i)}"></span>'
        f"{escape(names[i])}</th><td>{counts[i]}</td></tr>"
        for i in shown
    )
    return (
        f'<div class="counts"><p class="total" role="status">{total} '
        f"{'box' if total == 1 else 'boxes'} found</p>"
        # focusable, since a long table scrolls
        '<div class="rows" tabindex="0" role="group" aria-label="Boxes of each class">'
        '<table><thead><tr><th scope="col">Class</th><th scope="col">Boxes</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )
