"""Options of commands, written down once: in the dataclass that holds them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar, get_type_hints

_Command = TypeVar("_Command", bound=Callable[..., None])


def with_options(without: Collection[str] = ()) -> Callable[[_Command], _Command]:
    """Gives typer the fields of a command's dataclass parameters, each an option of its own.

    A field's type carries its help, ``Annotated[int, typer.Option(help="Tokens.")]``. A parameter's
    own default, an instance, replaces the defaults of its fields.

    Args:
        without: Fields that are no options of this command; they keep their defaults.
    """

    def decorate(command: _Command) -> _Command:
        groups: dict[str, Any] = {}  # the dataclass of each parameter, or the instance it starts as
        shown: dict[str, list[str]] = {}
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            kind: Any = parameter.annotation
            if not dataclasses.is_dataclass(kind):
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            groups[name] = kind if parameter.default is parameter.empty else parameter.default
            fields = [field for field in dataclasses.fields(kind) if field.name not in without]
            shown[name] = [field.name for field in fields]
            hints = get_type_hints(kind, include_extras=True)
            parameters += [_parameter(field, hints[field.name], groups[name]) for field in fields]

        @functools.wraps(command)
        def run(**chosen: Any) -> None:
            for name, group in groups.items():
                values = {field: chosen.pop(field) for field in shown[name]}
                make = (
                    group
                    if isinstance(group, type)
                    else functools.partial(dataclasses.replace, group)
                )
                chosen[name] = make(**values)
            command(**chosen)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate


def _parameter(field: "dataclasses.Field[Any]", hint: Any, group: Any) -> inspect.Parameter:
    """Returns what typer must see of a field of a dataclass, or of an instance of one."""
    default = inspect.Parameter.empty
    if not isinstance(group, type):
        default = getattr(group, field.name)
    elif field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=default, annotation=hint)
