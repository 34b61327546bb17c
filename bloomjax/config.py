"""Flags and gin files, turned into one call.

`config.run("train")` reads `--gin_file=FILE` and `--gin.NAME=VALUE`, builds the objects they name
and calls `train` with them. No other module imports gin.

gin 0.5.0 accepts a misspelt macro, a wrong type and a key given twice without a word, and reports
the rest with a traceback. Here each mistake is one line, found before anything is built. This needs
private parts of gin, which is why pyproject.toml pins that release (the last one, of 2021).
"""

import contextlib
import copy
import difflib
import importlib
import inspect
import os
import re
import sys
import tokenize
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gin
from absl import app, flags
from gin import config as gin_config
from gin import config_parser

from bloomjax import job, out_of_memory
from bloomjax.errors import EXIT_RESTART, BadInput, NoRoom, Restart

Configurables = Sequence[tuple[str, Sequence[str]]]
Key = tuple[str, str, str]  # scope, selector, parameter; macro NAME is (NAME, _MACRO, "value")

# What a gin file may name: a module and names in it. Imported when a verb starts, not before.
CONFIGURABLES: Configurables = (
    ("bloomjax.model", ("BloomConfig", "Bloom")),
    ("bloomjax.mup", ("MuP",)),
    (
        "bloomjax.positions",
        ("NoPositions", "LearnedPositions", "SinusoidalPositions", "Rotary", "Alibi"),
    ),
    ("bloomjax.activations", ("Gelu", "SquaredRelu", "SwiGlu", "GeGlu", "ReGlu", "LiGlu")),
    ("bloomjax.optimizer", ("adamw",)),
    ("bloomjax.schedules", ("BatchSchedule", "CosineSchedule")),
    ("bloomjax.curriculum", ("LengthCurriculum",)),
    ("bloomjax.data", ("TrainData", "Phase", "EvalData")),
    ("bloomjax.objectives", ("CausalLM", "PrefixLM", "SpanCorruption", "InputsTargets")),
    ("bloomjax.mixture_weights", ("TemperatureWeights", "UniMaxWeights")),
    ("bloomjax.distributed", ("Cluster",)),
    ("bloomjax.partitioning", ("MeshShape",)),
    ("bloomjax.checkpoints", ("Checkpoints",)),
    ("bloomjax.health", ("Health",)),
    ("bloomjax.reweighting", ("DoReMi",)),
    ("bloomjax.stops", ("StopConditions",)),
    ("bloomjax.guard", ("SpikeGuard",)),
    ("bloomjax.watchdog", ("Watchdog",)),
    ("bloomjax.stragglers", ("Stragglers",)),
    ("bloomjax.drift", ("ReplicaCheck",)),
    ("bloomjax.fault", ("fault",)),
    ("bloomjax.energy_meter", ("Energy",)),
    ("bloomjax.predicted_loss", ("PredictedLoss",)),
    ("bloomjax.language_noise", ("LanguageNoise",)),
    ("bloomjax.metrics", ("EventFileWriter", "clu_writer")),
    ("bloomjax.train_step", ("StepOptions",)),
    ("bloomjax.prepare", ("prepare",)),
    ("bloomjax.train", ("train",)),
)

_GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "Gin file, sought here and then among the shipped ones; later files win."
)
_GIN_BINDINGS = flags.DEFINE_multi_string(
    "gin_bindings", [], "'NAME = VALUE', read after all files; --gin.NAME=VALUE is its short form."
)

_WARN_UNUSED = flags.DEFINE_bool("warn_unused", True, "Name the flags that the verb does not read.")

_MACRO = "gin.macro"
# Beside gin's global configuration: the file:line or flag of each binding, and the macros that any
# statement mentions, because one that a later statement overrides is still no misspelling.
_SOURCES: dict[Key, str] = {}
_MENTIONED: set[str] = set()


def run(
    name: str, argv: Sequence[str] | None = None, configurables: Configurables = CONFIGURABLES
) -> NoReturn:
    """Calls the function registered as `name` with what flags and gin files bind, and exits.

    The exit code is the function's result where that is an int, else 0. BadInput, from here or from
    the function, is one line on stderr and exit code 1; other exceptions keep their traceback.
    """
    call(lambda: _call(name, configurables), argv)


def call(
    function: Callable[[], Any],
    argv: Sequence[str] | None = None,
    own_flags: flags.FlagValues | None = None,
) -> NoReturn:
    """`run` for a verb that takes its input from flags alone.

    `own_flags` are known while the verb runs: verbs that share names of flags can live in one process.
    """
    own = own_flags or flags.FlagValues()
    try:
        # Not app.run, which turns on INFO logs, Orbax's among them.
        app.define_help_flags()
        flags.FLAGS.append_flag_values(own)
        _parse_flags(sys.argv if argv is None else argv, own)
        result = function()
    except BadInput as error:
        # To a constructor's error gin appends lines that say where it was called.
        message = str(error).split("\n  In call to configurable")[0]
        result = job.fail(1, message)
    except NoRoom as error:
        result = job.fail(1, str(error))
    except KeyboardInterrupt:
        result = job.fail(130, "interrupted")
    except Restart as error:
        result = job.fail(EXIT_RESTART, str(error))
    except (
        BrokenPipeError
    ):  # of `| head`; else Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        result = job.fail(1, "nobody reads the output") if job.is_shared() else 1
    except Exception as error:
        if not job.is_shared() and not job.is_fault(error) and not out_of_memory.line(error):
            raise
        result = job.fail_with(error)
    finally:
        flags.FLAGS.remove_flag_values(own)
    sys.exit(result if isinstance(result, int) else 0)


def build(
    binding: str,
    gin_file: str | Path | None = None,
    bindings: Sequence[str] = (),
    configurables: Configurables = CONFIGURABLES,
) -> Any:
    """Builds what `gin_file`, then `bindings` ("NAME = VALUE"), bind to e.g. "train.model".

    Without `gin_file` it takes the files and bindings of this process's flags. Nothing else is
    built, and gin's configuration is afterwards what it was. Raises BadInput.
    """
    with _kept():
        if gin_file is None:
            _parse(_GIN_FILE.value, [*_GIN_BINDINGS.value, *bindings], configurables)
        else:
            _parse([str(gin_file)], bindings, configurables)
        scope, selector, parameter = config_parser.parse_binding_key(binding)
        key = (scope, _configurable(selector).selector, parameter)
        if key not in _keys():
            where = gin_file or f"--gin_file={','.join(_GIN_FILE.value) or '(none given)'}"
            raise BadInput(f"gin: {where} does not bind {binding}")
        reach = _Reach()
        reach.value(key)
        _check(reach)
        return copy.deepcopy(_value(key))  # gin evaluates a reference when it is copied


def combined(
    name: str,
    gin_files: Sequence[str | Path] = (),
    bindings: Sequence[str] = (),
    configurables: Configurables = CONFIGURABLES,
) -> str:
    """The gin files of this process's flags, then `gin_files`, its bindings and `bindings` ("NAME = VALUE"), as the
    text of one gin file that runs alone, wherever it lies.

    Nothing is built. Raises BadInput for what the verb `name` would refuse.
    """
    with _kept():
        files = [*_GIN_FILE.value, *map(str, gin_files)]
        _parse(files, [*_GIN_BINDINGS.value, *bindings], configurables)
        reach = _Reach()
        reach.call(_configurable(name))
        _check(reach)
        return operative_config()


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """gin's configuration is afterwards what it was."""
    stores: list[Any] = [gin_config._CONFIG, gin_config._OPERATIVE_CONFIG, gin_config._IMPORTS]
    stores += [_SOURCES, _MENTIONED]
    kept = [store.copy() for store in stores]
    try:
        yield
    finally:
        for store, content in zip(stores, kept, strict=True):
            store.clear()
            store.update(content)


def operative_config() -> str:
    """The present configuration as the text of one gin file that runs alone.

    It has all bindings, with their macros, and the defaults of everything called so far, which
    later versions may change. gin.operative_config_str would not do: it writes what a macro builds
    as MACRO/Bloom.num_layers, against which a later --gin.Bloom.num_layers is powerless.
    """
    values = {key: _value(key) for key in _keys() if key[1] != _MACRO}
    for (scope, selector), called_with in gin_config._OPERATIVE_CONFIG.items():
        if selector != _MACRO:
            for parameter in called_with.keys() - _bindings_in(scope, selector).keys():
                values["", selector, parameter] = called_with[parameter]
    macros: dict[Key, Any] = {}
    to_search = list(values.values())
    for value in to_search:  # which grows
        for name in map(_scope, filter(_is_macro, _references(value))):
            key = (name, _MACRO, "value")
            if key not in macros and key in _SOURCES:
                macros[key] = _value(key)
                to_search.append(macros[key])
    groups = [sorted({statement.format() for statement in gin_config._IMPORTS})]
    for bound in (macros, values):
        groups.append(sorted(f"{_label(key)} = {value!r}" for key, value in bound.items()))
    return "\n\n".join("\n".join(lines) for lines in groups if lines) + "\n"


def use_gin_file(gin_file: str | Path) -> None:
    """Takes `gin_file` where the flags name none, with the bindings of the flags: for a verb that finds one itself."""
    if not _GIN_FILE.value:
        flags.FLAGS[_GIN_FILE.name].value = [str(gin_file)]


def arguments() -> list[str]:
    """The gin flags of this process, for another verb started with the same configuration."""
    files = [f"--gin_file={path}" for path in _GIN_FILE.value]
    return files + [f"--gin_bindings={binding}" for binding in _GIN_BINDINGS.value]


def unused_bindings(name: str) -> list[str]:
    """Bindings and macros, such as "CosineSchedule.peak", which a call of `name` does not read."""
    reach = _Reach()
    reach.call(_configurable(name))
    return sorted(_label(key) for key in _keys() if key not in reach.used)


def register(configurables: Configurables = CONFIGURABLES) -> None:
    """Imports the modules and registers their functions and classes, which stay as they are."""
    for module, names in configurables:
        # By its real name: under `python -m` the verb's module exists a second time as __main__.
        namespace = vars(importlib.import_module(module))
        for name in names:
            known = gin_config._REGISTRY.get(f"{module}.{name}")
            if known is None or known.wrapped is not namespace[name]:
                # This mode lets a reloaded module replace its former self.
                with gin_config.interactive_mode():
                    gin.register(name, module=module)(namespace[name])


def gin_dir() -> Path:
    """Folder of the shipped gin files: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "gin" if (package / "gin").is_dir() else package.parent / "gin"


def find(gin_file: str | Path) -> Path:
    """Path of `gin_file`, sought in the working directory and then in gin_dir().

    Raises BadInput, with the names of the shipped files.
    """
    for path in (Path(gin_file), gin_dir() / gin_file):
        if path.is_file():
            return path
    raise BadInput(
        f"no gin file {str(gin_file)!r} in {Path.cwd()} or {gin_dir()}"
        f"{_suggest(str(gin_file), _shipped())} (shipped: {', '.join(_shipped())})"
    )


def _shipped() -> list[str]:
    return sorted(path.relative_to(gin_dir()).as_posix() for path in gin_dir().rglob("*.gin"))


def _parse_flags(argv: Sequence[str], own: flags.FlagValues) -> None:
    arguments = []
    for argument in argv:
        if argument.startswith("--gin."):
            name, equals, value = argument.removeprefix("--gin.").partition("=")
            if not equals:
                raise BadInput(f"gin: {argument} has no value; write {argument}=VALUE")
            argument = f"--gin_bindings={name} = {value}"
        arguments.append(argument)
    for name in (_GIN_FILE.name, _GIN_BINDINGS.name, *own):
        flags.FLAGS[name].unparse()  # else a second run in one process adds to the first
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # for --help
    try:
        rest = flags.FLAGS(arguments)[1:]
    except flags.Error as error:
        raise BadInput(str(error)) from None
    own.mark_as_parsed()
    if rest:
        raise BadInput(f"unexpected argument {rest[0]!r}; gin files are given as --gin_file=FILE")


def _call(name: str, configurables: Configurables) -> Any:
    _parse(_GIN_FILE.value, _GIN_BINDINGS.value, configurables)
    verb, reach = _configurable(name), _Reach()
    reach.call(verb)
    _check(reach)
    for key in _keys():
        if _WARN_UNUSED.value and key not in reach.used and _SOURCES[key].startswith("--"):
            print(f"bloomjax: gin: {_SOURCES[key]} has no effect on {name}", file=sys.stderr)
    arguments = gin.get_bindings(name)
    # The function itself, not gin's wrapper of it, which drops the causes of exceptions.
    defaults = gin_config._get_default_configurable_parameter_values(verb.wrapped, None, None)
    gin_config._OPERATIVE_CONFIG["", verb.selector] = defaults
    return verb.wrapped(**arguments)


# gin's tables


def _keys() -> list[Key]:
    return [(*call, name) for call, bound in gin_config._CONFIG.items() for name in bound]


def _value(key: Key) -> Any:
    return gin_config._CONFIG[key[:2]][key[2]]


def _label(key: Key) -> str:
    return key[0] if key[1] == _MACRO else gin_config._format_binding_key(*key)


def _bindings_in(scope: str, selector: str) -> dict[str, Key]:
    """The binding that holds for each parameter of a call in `scope`; inner scopes win."""
    parts = scope.split("/") if scope else []
    outer_scopes = ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]
    bound = {outer: gin_config._CONFIG.get((outer, selector), {}) for outer in outer_scopes}
    return {name: (outer, selector, name) for outer in outer_scopes for name in bound[outer]}


def _configurable(selector: str) -> gin_config.Configurable:
    matches = gin_config._REGISTRY.get_all_matches(selector)
    if not matches:
        names = {known.name for _, known in gin_config._REGISTRY.items() if known.module != "gin"}
        raise BadInput(f"nothing is registered as {selector!r}{_suggest(selector, names)}")
    if len(matches) > 1:
        raise BadInput(f"{selector!r} may be {' or '.join(sorted(m.selector for m in matches))}")
    return matches[0]


def _parameters(configurable: gin_config.Configurable) -> dict[str, inspect.Parameter]:
    function = configurable.wrapped
    if not inspect.isclass(function):
        return dict(inspect.signature(function).parameters)
    constructor: Any = gin_config._find_class_construction_fn(function)
    return dict(list(inspect.signature(constructor).parameters.items())[1:])  # without self


def _suggest(name: str, pool: Iterable[str]) -> str:
    known = {candidate.lower(): candidate for candidate in pool}
    close = difflib.get_close_matches(name.lower(), known)
    return f"; did you mean {' or '.join(repr(known[match]) for match in close)}?" if close else ""


# Reading


def _error(where: str, message: object) -> BadInput:
    return BadInput(f"gin: {where}: {message}")


def _parse(gin_files: Sequence[str], bindings: Sequence[str], configurables: Configurables) -> None:
    gin.clear_config()
    _SOURCES.clear()
    _MENTIONED.clear()
    register(configurables)
    for gin_file in gin_files:
        _read_file(gin_file, "--gin_file", ())
    for binding in bindings:
        flag = "--gin." + binding.replace(" = ", "=", 1)
        _read(binding, lambda line, flag=flag: flag, ())


def _read_file(gin_file: str, where: str, includers: tuple[str, ...]) -> None:
    if gin_file in includers:
        raise _error(where, f"{gin_file} includes itself")
    try:
        text = find(gin_file).read_text(encoding="utf-8")
    except (BadInput, UnicodeDecodeError) as error:
        raise _error(where, error) from None
    _read(text, lambda line: f"{gin_file}:{line}", (*includers, gin_file))


def _read(text: str, place: Callable[[int], str], files: tuple[str, ...]) -> None:
    """Binds the statements of `text`, a file or one flag; `place` says where its line n is."""
    here: dict[Key, str] = {}
    for statement in _statements(text, place):
        where = place(statement.location.line_num)
        if isinstance(statement, config_parser.IncludeStatement):
            _read_file(statement.filename, where, files)
        elif isinstance(statement, config_parser.ImportStatement):
            try:
                importlib.import_module(statement.module)
            except ImportError as error:
                raise _error(where, f"cannot import {statement.module}: {error}") from None
            gin_config._IMPORTS.add(statement)
        elif isinstance(statement, config_parser.BindingStatement):
            try:
                key = _key(statement)
            except BadInput as error:
                raise _error(where, error) from None
            if key in here:
                raise _error(where, f"{_label(key)} has a value already, from {here[key]}")
            if key[1] == _MACRO and key[0] in map(_scope, _references(statement.value)):
                raise _error(where, f"the macro {key[0]} refers to itself")
            gin.bind_parameter(key, statement.value)
            here[key] = _SOURCES[key] = where


class _Delegate(gin_config.ParserDelegate):
    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        _configurable(scoped_selector.rsplit("/", 1)[-1])
        return super().configurable_reference(scoped_selector, evaluate)

    def macro(self, name: str) -> Any:
        _MENTIONED.add(name)
        return super().macro(name)


def _statements(text: str, place: Callable[[int], str]) -> Iterator[Any]:
    try:
        yield from config_parser.ConfigParser(text, _Delegate())
    except SyntaxError as error:
        line = error.lineno or 1
        raise _error(place(line), _explain(text, line, error.msg)) from None
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise _error(place(line), _explain(text, line, message)) from None
    except BadInput as error:  # of _Delegate; gin has appended the place
        message, line = re.findall(r"^(.*)\n  In .* line (\d+)\n", str(error))[0]
        raise _error(place(int(line)), message) from None


def _explain(text: str, line: int, reason: str) -> str:
    source = "".join(text.splitlines()[line - 1 : line]).strip()
    name, _, value = (part.strip() for part in source.split("#")[0].partition("="))
    if value.lower() in ("true", "false", "none"):
        return f"cannot read {value!r}; write {value.capitalize()}"
    if re.fullmatch(r"[^'\"@%(){}\[\],]+", value):
        quoted = f'{name} = "{value}" in a file, --gin.{name}=\'"{value}"\' in a shell'
        return f"cannot read {value!r}; text needs quotes: {quoted}"
    return f"cannot read {source!r}: {reason.splitlines()[0]}"


def _key(statement: config_parser.BindingStatement) -> Key:
    scope, selector, parameter = statement[:3]
    if not parameter:
        return f"{scope}/{selector}" if scope else selector, _MACRO, "value"
    configurable = _configurable(selector)
    known = _parameters(configurable)
    if parameter in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return scope, configurable.selector, parameter
    raise BadInput(
        f"{selector!r} has no parameter {parameter!r}{_suggest(parameter, known)}"
        f" (parameters: {', '.join(known)})"
    )


# Checking


class _Reach:
    """What a call reaches through references: the bindings it reads and the values it lacks."""

    def __init__(self) -> None:
        self.used: set[Key] = set()
        self.problems: list[str] = []
        self._seen: set[tuple[str, str, bool]] = set()

    def call(
        self, configurable: gin_config.Configurable, scope: str = "", evaluated: bool = True
    ) -> None:
        """Follows a call in `scope`; one that is not `evaluated` yet may get more arguments."""
        node = (configurable.selector, scope, evaluated)
        if node in self._seen:
            return
        self._seen.add(node)
        bound = _bindings_in(scope, configurable.selector)
        for name, parameter in _parameters(configurable).items():
            optional = parameter.default is not parameter.empty or "VAR" in parameter.kind.name
            if evaluated and name not in bound and not optional:
                self.problems.append(f"{configurable.name}.{name} must be given")
        for key in bound.values():
            self.value(key, scope)

    def value(self, key: Key, scope: str = "") -> None:
        """Follows the references in the value bound to `key`, read in `scope`."""
        self.used.add(key)
        for reference in _references(_value(key)):
            name = _scope(reference)
            if reference.configurable.selector == "gin.constant":  # of which gin.REQUIRED is all
                self.problems.append(f"{_SOURCES[key]}: {_label(key)} must be given")
            elif _is_macro(reference) and (name, _MACRO) not in gin_config._CONFIG:
                macros = [macro for macro, selector, _ in _keys() if selector == _MACRO]
                self.problems.append(
                    f"{_SOURCES[key]}: {_label(key)} uses %{name}, which has no value"
                    f"{_suggest(name, macros)}"
                )
            else:
                self.call(reference.configurable, name or scope, reference.evaluate)


def _check(reach: _Reach) -> None:
    problems = [*_unused_macros(), *reach.problems, *_wrong_types()]
    if problems:
        from_file = any(not source.startswith("--") for source in _SOURCES.values())
        hint = "" if from_file else f" (no --gin_file given; shipped: {', '.join(_shipped())})"
        raise BadInput(f"gin: {'; '.join(dict.fromkeys(problems))}{hint}")


def _references(value: Any) -> Iterator[Any]:
    return gin_config.iterate_references(value)


def _scope(reference: Any) -> str:  # of a macro: its name
    return "/".join(reference.scopes)


def _is_reference(value: Any) -> bool:
    return isinstance(value, gin_config.ConfigurableReference)


def _is_macro(value: Any) -> bool:
    return _is_reference(value) and value.configurable.selector == _MACRO


def _unused_macros() -> Iterator[str]:
    for key in _keys():
        if key[1] == _MACRO and key[0] not in _MENTIONED:
            yield f"{_SOURCES[key]}: nothing uses the macro {key[0]}{_suggest(key[0], _MENTIONED)}"


def _wrong_types() -> Iterator[str]:
    for key in _keys():
        configurable = gin_config._REGISTRY[key[1]]
        parameter = _parameters(configurable).get(key[2])
        if parameter is None:  # one of **kwargs
            continue
        hint, bound = parameter.annotation, _value(key)
        if isinstance(hint, str):  # from __future__ import annotations
            try:
                hint = eval(hint, vars(sys.modules[configurable.wrapped.__module__]))
            except NameError:  # imported for type checkers only
                continue
        value, source = _resolve(bound, _SOURCES[key])
        implicit_none = type(value) is type(parameter.default) is types.NoneType
        if hint is parameter.empty or implicit_none or _fits(value, hint):
            continue
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        got = f"{bound} = {value!r}" if _is_macro(bound) else repr(value)
        repair = ""
        if _is_reference(value) and not value.evaluate:
            repair = f" (write {value}())"
        elif isinstance(value, float) and value.is_integer() and _fits(int(value), hint):
            repair = f" (write {int(value)})"
        elif isinstance(value, list) and _fits(tuple(value), hint):
            repair = f" (write {tuple(value)})"
        yield f"{source}: {_label(key)} must be {expected}, got {got}{repair}"


def _resolve(value: Any, source: str = "") -> tuple[Any, str]:
    """The value behind macros and where that was bound; a macro that has no value stays."""
    key = (_scope(value), _MACRO, "value") if _is_macro(value) else None
    return _resolve(_value(key), _SOURCES[key]) if key in _SOURCES else (value, source)


def _fits(value: Any, hint: Any) -> bool:
    """Whether `hint` allows `value`; True for hints and references that cannot be judged here."""
    value, _ = _resolve(value)
    kind, of = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in of)
    if kind is typing.Literal and not _is_reference(value):
        return any(type(value) is type(member) and value == member for member in of)
    if kind in (Any, object) or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if _is_reference(value):
        built = value.configurable.wrapped
        if not value.evaluate:
            return kind in (type, abc.Callable)
        return not isinstance(built, type) or issubclass(built, kind)
    if kind in (int, float):  # a bool is not a number here, an int is a float
        return type(value) in (int, kind)
    if not isinstance(value, kind) or (isinstance(value, str) and of):  # "ab" is no Sequence[str]
        return False
    if isinstance(value, dict) and of:
        return all(_fits(item, of[0]) and _fits(value[item], of[1]) for item in value)
    if kind is tuple and of and of[-1] is not Ellipsis:
        return len(of) == len(value) and all(map(_fits, value, of))
    return not isinstance(value, list | tuple) or all(_fits(v, of[0]) for v in value if of)
