"""`tokenmerge visualize`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="visualize",
    summary="show which patches merge into one token: pictures, films, or a page",
    module="tokenmerge.tools.visualize",
    options="VisualizeOptions",
    extra="visualize",
    example="tokenmerge visualize vit_base_patch16_224 photo.jpg --pretrained --out a.html",
)
