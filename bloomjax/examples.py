"""A document of two parts, inputs and targets, on its way from a text file to the token store."""

FIELDS = "inputs+targets"  # in place of the name of a text field: a document is made of both


class Example(str):
    """Inputs and targets; as a string, one after the other."""

    inputs: str
    targets: str

    def __new__(cls, inputs: str, targets: str) -> "Example":
        made = super().__new__(cls, inputs + targets)
        made.inputs, made.targets = inputs, targets
        return made
