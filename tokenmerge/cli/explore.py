"""`tokenmerge explore`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="explore",
    summary="serve the interactive page of visualize in a browser, for your own files",
    module="tokenmerge.tools.explore",
    options="ExploreOptions",
    extra="explore",
    example="tokenmerge explore vit_base_patch16_224 --pretrained --data photos",
)
