"""`tokenmerge train`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="train",
    summary="train or fine-tune a model with merging, on one machine or many",
    module="tokenmerge.tools.train",
    options="TrainOptions",
    extra="train",
    example="tokenmerge train local-dir:digits/model --r 24 --data digits --output run",
)
