"""A command line from a dataclass of settings: every field is a flag."""

import argparse
import os
from dataclasses import field, fields


def flag(default, help: str, choices=None, least: int = 1, within: str = "[0, inf)", group=""):
    """A field that is a flag. least: the smallest value of a whole number; within: the interval of
    any other number, a round bracket for an end that is not in it; group: starts one."""
    metadata = {"help": help, "choices": choices, "least": least, "within": within, "group": group}
    return field(default=default, metadata=metadata)


def make_parser(
    Config, usage: str, description: str, switches: dict[str, str]
) -> argparse.ArgumentParser:
    """A flag for every field of Config, which is a dataclass of flag()s, and switches of a name and
    a help besides; those that are not given leave no trace."""
    parser = argparse.ArgumentParser(
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # it may come from a finished run
    )
    for f in fields(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        name = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        if f.default != "":
            default = f"{f.default:.4g}" if isinstance(f.default, float) else f.default
            text += f" (default: {default})"
        if isinstance(f.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = words if type(f.default) is str else type(f.default)
            group.add_argument(name, help=text, type=kind, choices=f.metadata["choices"])
    for name, text in switches.items():
        group.add_argument(name, action="store_true", help=text)
    return parser


def words(value: str) -> str:
    """A flag's text, with the ~ of --out=~/x, which shells leave; nothing is no value."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty; is a variable not set?")
    return os.path.expanduser(value)


def check_numbers(parser: argparse.ArgumentParser, cfg):
    """End with exit code 2 where a number is not one of those that its flag takes."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if type(f.default) is int and not f.metadata["least"] <= value < 2**63:
            least = f.metadata["least"]
            parser.error(f"{f.name} must be at least {least} and below 2**63, not {value}")
        if type(f.default) is float:
            within = f.metadata["within"]
            low, high = map(float, within[1:-1].split(","))
            is_end = value == low and within[0] == "[" or value == high and within[-1] == "]"
            if not (low < value < high or is_end):
                parser.error(f"{f.name} must lie in {within}, not {value}")
