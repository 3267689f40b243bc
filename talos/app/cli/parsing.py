"""How a command line is read: options given once, and errors in the words of its options."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from talos.app.cli.options import as_options
from talos.errors import TalosValueError

__all__ = ["Command", "usage_message"]

# Arguments of the library that a message may propose, and that are no option of most commands.
_NO_OPTIONS = {"force": "", "overwrite": "", "strict": ""}


class Command(TyperCommand):
    """A command whose errors name its options, and that refuses one given twice.

    Attributes:
        facts: by the name of a command, what fills the braces in the help of its options. They
            come from the engine, which takes seconds to import.
    """

    facts: ClassVar[Mapping[str | None, Callable[[], Mapping[str, Any]]]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of the command line.

        Raises:
            TalosValueError: an option that takes one value is given twice.
        """
        parser = self.make_parser(ctx)
        options = {id(each): each for each in parser._long_opt.values() if each.action == "store"}
        for option in options.values():
            option.action = "append"  # of "store" the last value would win
        try:
            values, _, _ = parser.parse_args(list(args))
        except typer.TyperException as error:
            if getattr(error, "ctx", ctx) is None:
                vars(error)["ctx"] = ctx
            raise
        for option in options.values():
            given = values.get(str(option.dest), ())
            if len(given) > 1:
                raise TalosValueError(
                    f"{option.obj.opts[0]} must be given once, got {' and '.join(given)}; run "
                    f"`talos {self.name}` once for each"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; errors name its options in the place of the library's arguments."""
        with self._as_options():
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Fill the braces of the help, and print it."""
        if self.name in self.facts:
            facts = self.facts[self.name]()
            for param in self.params:
                if isinstance(param, TyperArgument | TyperOption) and param.help is not None:
                    param.help = param.help.format(**facts)
        super().format_help(ctx, formatter)

    def _as_options(self) -> AbstractContextManager[None]:
        own = {param.name: _shown(param) for param in self.params if param.name is not None}
        model = own.get("model", own.get("base"))
        library = {"source": model} if model else {}
        if "out" in own:
            library["path must be writable,"] = f"{own['out']} must be writable,"
        return as_options({**_NO_OPTIONS, **library, **own})


def usage_message(error: typer.TyperException) -> str:
    """Return the message of an error over a command line, as the project words its errors."""
    text = error.format_message().rstrip(".")
    param, option = getattr(error, "param", None), getattr(error, "option_name", None)
    if hasattr(error, "possibilities"):
        near = f"; did you mean {error.possibilities[0]}?" if error.possibilities else ""
        text = f"no such option: {option}{near}"
    elif option is not None and "requires an argument" in text:
        text = f"{option} must have a value, got none"
    elif option is not None:
        text = f"{option} must have no value, got one"
    elif hasattr(error, "param_type"):  # it is missing
        text = f"{_shown(param)} must be given, got none"
    elif errors := getattr(error.__cause__, "errors", None):
        [found, *_] = errors()
        wanted = found["msg"].partition(",")[0].removeprefix("Input should be ")
        text = f"{_shown(param)} must be {wanted}, got {found['input']}"
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "talos"
    return f"{text}{' ' if text.endswith('?') else '; '}see `{command} --help`"


def _shown(param: Any) -> str:
    """Return the name of an option or argument as the help shows it."""
    return str(param.opts[0] if isinstance(param, TyperOption) else param.metavar or param.name)
