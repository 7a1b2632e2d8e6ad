"""The one exception of this package: something is wrong with the data, and the user can fix it."""


class DataError(ValueError):
    """Wrong input text, tokenizer or corpus. The message says where, the values, and the way out."""
