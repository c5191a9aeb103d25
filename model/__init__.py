"""The model room: pixels → boxes, in plain PyTorch.

Shape legend, used in every module of the room:
    B images, A anchors per cell, H and W cells of a level, M candidates, N boxes, C classes.
Boxes are xyxy in pixels unless a name says otherwise.
"""
