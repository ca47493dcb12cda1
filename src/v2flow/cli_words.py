"""Words of the command line that several verbs say."""


def sentence(summary: str) -> str:
    """A verb's summary as the sentence above its options: only the first letter changes.

    >>> sentence("write a model in the Hugging Face way")
    'Write a model in the Hugging Face way.'
    """
    return f"{summary[0].upper()}{summary[1:]}."
