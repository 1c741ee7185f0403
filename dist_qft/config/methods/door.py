"""The door to the methods' sections: their union, keyed on `method.name`. A new method adds its class here."""

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, TypeAdapter

from dist_qft.config.methods.method import MethodConfig
from dist_qft.config.methods.qablora import QabloraConfig
from dist_qft.config.methods.qahira import QahiraConfig
from dist_qft.config.methods.qalora import QaloraConfig
from dist_qft.config.methods.qbara import QbaraConfig
from dist_qft.config.methods.qlora import QloraConfig
from dist_qft.config.methods.qst import QstConfig

_Union = QloraConfig | QbaraConfig | QaloraConfig | QahiraConfig | QabloraConfig | QstConfig

# The method of a config that names none.
DEFAULT = "qlora"
METHODS: dict[str, type[MethodConfig]] = {
    get_args(kind.model_fields["name"].annotation)[0]: kind for kind in get_args(_Union)
}


def _with_name(values: Any) -> Any:
    return {"name": DEFAULT, **values} if isinstance(values, dict) else values


AnyMethod = Annotated[_Union, Field(discriminator="name"), BeforeValidator(_with_name)]


def make_method(**settings: Any) -> MethodConfig:
    """A `method` section from its keys, checked as in a config. Raises pydantic's ValidationError."""
    return TypeAdapter(AnyMethod).validate_python(settings)
