"""The demo room: a web page on this machine that shows what a detector finds in a picture.

    images.py    a file → RGB pixels, or one sentence about what is wrong with it
    overlay.py   boxes → drawn into a picture, or as SVG above one
    results.py   boxes → the answer of the API, COCO JSON, counts
    page.py      the pieces of HTML; assets/ has the style, the script and the example pictures
    handlers.py  what happens on upload, slider, download and API call
    layout.py    what stands where on the page, and which event calls which handler
    server.py    the walls: loopback only, in both directions
    app.py       `serve`: from weights to a running page, until Ctrl-C

Shape legend: H, W rows and columns of a picture, N boxes. Boxes are xyxy in pixels of the picture
unless a name says otherwise. Only `handlers` and `layout` import gradio, and `app` imports them
when it serves.
"""
