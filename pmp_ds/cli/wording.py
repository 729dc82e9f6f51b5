"""What jsonargparse says about a mistake, in one line and without its own vocabulary."""

import re
from collections.abc import Mapping, Sequence

from pmp_ds.cli.fields import Field
from pmp_ds.errors import UserError, did_you_mean


def one_line(error: Exception, flags: Sequence[str], options: Mapping[str, Field]) -> str:
    """Return the message of ``error``; of ``options`` it names the flag, of settings the key."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    if match := re.match(r"unrecognized arguments: (\S+)", text):
        given = match[1].partition("=")[0]
        if not given.startswith("-"):
            return f"unexpected argument {given!r}; every setting is a flag, see --help"
        guess = did_you_mean(given, [flag.replace("_", "-") for flag in flags])
        return f"unknown flag {given}{guess}; see --help for all of them"
    if match := re.match(r"the following arguments are required: ([\w, ]+)$", text):
        names = match[1].split(", ")
        missing = [options[name].shown if name in options else name for name in names]
        return f"{', '.join(missing)} {'is' if len(names) == 1 else 'are'} missing; see --help"
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", text) or re.search(
        r"Option '(\S+)' is not accepted", text
    ):
        key = ".".join(match.groups())
        guess = did_you_mean(key, [flag.lstrip("-") for flag in flags])
        return f"unknown setting {key}{guess}; see --help for all of them"
    if match := re.match(r'Parser key "([^"]+)": (.*)', text):
        name = options[match[1]].shown if match[1] in options else match[1]
        return f"{name}: {_plain_types(match[2])}"
    return _plain_types(text)


def _plain_types(text: str) -> str:
    text = re.sub(r"Problem with given class_path '[^']*': ", "", text)
    text = re.sub(r'Parser key "([^"]+)": ', r"\1: ", text)
    text = re.sub(r"the following arguments are required: (.*)$", r"\1 is missing", text)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[('[^',]*')\]", r"\1", text)
    if match := re.search(r"Subtypes: \[(.*?)\] Errors.*Given value: (.*)$", text):
        kinds = match[1].replace("NoneType", "null").replace(", ", " or ")
        text = f"expected {kinds}, got {match[2]}"
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"\bExpected an? ", "expected ", text)
    text = re.sub(r"\. Got value: ?(.*)$", r", got \1", text)
    return re.sub(r", got None$", ", got null", text)
