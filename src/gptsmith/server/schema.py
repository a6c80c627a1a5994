"""Request and response bodies: OpenAI's fields, and this engine's own. Unknown fields are rejected by name.

OpenAI's fields that are not supported have the type None: they may be absent or null, and are rejected otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from gptsmith.engine.sampling import INT32_MAX, SAMPLING_OPTIONS
from gptsmith.server.errors import check_json

Id = Annotated[int, Field(ge=0, le=INT32_MAX)]


def sampling_field(name: str, note: str = "", *, help: str | None = None) -> Any:
    """Return an optional field for a sampling option, with its range and its description (or `help`), then `note`."""
    option = SAMPLING_OPTIONS[name]
    limits: dict[str, Any] = option.request_range.limits()
    return Field(None, description=f"{help or option.help} {note}".rstrip(), **limits)


def _range_of(name: str) -> Any:
    limits: dict[str, Any] = SAMPLING_OPTIONS[name].request_range.limits()
    return Field(**limits)


_REGEX: Any = Field(None, max_length=20_000, description="The output matches this regular expression.")
_GRAMMAR: Any = Field(None, max_length=100_000, description="The output follows this grammar, in Lark or GBNF.")
_CHOICE: Any = Field(None, min_length=1, max_length=1000, description="The output is one of these texts.")


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="The name of a model, as listed by /v1/models.")

    @model_validator(mode="before")
    @classmethod
    def _check_json(cls, values: Any) -> Any:
        check_json(values)
        return values


# Hints that cannot change the result of this server: accepted, and not used.
Hint = Annotated[str, Field(max_length=1024)] | None
ServiceTier = Literal["auto", "default", "flex", "priority", "scale"] | None
Verbosity = Literal["low", "medium", "high"] | None
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = Field(None, description="Add a last chunk with token counts.")
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(Request):
    """The fields that completions and chat completions share."""

    temperature: float | None = sampling_field("temperature", "Default: the model's own, else 1; 0 with beam search.")
    top_p: float | None = sampling_field("top_p")
    n: int | None = sampling_field("n")
    stop: str | Annotated[list[str], Field(max_length=16)] | None = Field(
        None, description="Stop before this text, or before any of up to 16 texts."
    )
    seed: int | None = sampling_field("seed")
    presence_penalty: float | None = sampling_field("presence_penalty")
    frequency_penalty: float | None = sampling_field("frequency_penalty")
    logit_bias: dict[str, Annotated[float, _range_of("logit_bias")]] | None = Field(
        None, description=f"{SAMPLING_OPTIONS['logit_bias'].help} -100 bans a token."
    )
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream=true.")
    user: str | None = Field(None, max_length=512, description="Written to the log.")
    service_tier: ServiceTier = None

    # extensions to OpenAI's API: pass them in extra_body with the official client
    top_k: int | None = sampling_field("top_k")
    min_p: float | None = sampling_field("min_p")
    typical_p: float | None = sampling_field("typical_p")
    repetition_penalty: float | None = sampling_field("repetition_penalty")
    min_tokens: int | None = sampling_field("min_tokens")
    best_of: int | None = sampling_field("best_of")
    beams: int | None = sampling_field("beams")
    length_penalty: float | None = sampling_field("length_penalty")
    early_stopping: bool | None = sampling_field("early_stopping")
    stop_token_ids: list[Id] | None = Field(None, description=SAMPLING_OPTIONS["stop_ids"].help)
    ignore_eos: bool | None = sampling_field("ignore_eos")
    overflow: Literal["error", "truncate", "shift"] | None = sampling_field("overflow")
    cache_prompt: bool | None = sampling_field("cache_prompt")
    regex: str | None = _REGEX
    grammar: str | None = _GRAMMAR
    choice: list[str] | None = _CHOICE
    prompt_cache_key: Hint = None
    prompt_cache_retention: Hint = None
    safety_identifier: Hint = None
    store: bool | None = Field(None, description="Answers are never stored.")
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    prompt_cache_options: None = None
    moderation: None = None


class TemplateOptions(BaseModel):
    """How a conversation is written as a prompt: extensions to OpenAI's API."""

    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with the beginning of an answer. Default true."
    )
    continue_final_message: bool | None = Field(
        None, description="End the prompt inside the last message, an assistant's, so that the answer continues it."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template, such as enable_thinking."
    )


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="The schema is always enforced.")


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["json_object"]


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[Id] | list[list[Id]] = Field(description="One or more texts or lists of token ids.")
    max_tokens: int | None = Field(
        None,
        ge=0,
        le=INT32_MAX,
        description=f"{SAMPLING_OPTIONS['max_tokens'].help} Default 16; 0 with echo scores the prompt.",
    )
    echo: bool | None = sampling_field("echo")
    logprobs: int | None = sampling_field("logprobs")
    response_format: ResponseFormat | None = Field(None, description="The format of the output: text or JSON.")

    suffix: None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    model_config = ConfigDict(extra="forbid")
    url: str = Field(description="data:image/png;base64,…, or an address in a domain that the server fetches from.")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Accepted; a model has one resolution, which it always uses."
    )


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    arguments: str = Field(description="A JSON object, encoded as a string.")


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(
        default=None, ge=0, exclude=True, description="Accepted as part of a streamed answer; ignored."
    )


class SentFunction(CalledFunction):
    parsed_arguments: Any = Field(None, exclude=True, description="The client's own reading of the arguments; unused.")


class SentToolCall(ToolCall):
    """A call of an earlier answer, with what OpenAI's client adds to it."""

    function: SentFunction


Content = str | list[TextPart]


class SystemMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class AssistantMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[SentToolCall] | None = None
    reasoning_content: str | None = Field(None, description="The reasoning of an earlier answer, for the template.")
    name: str | None = None
    parsed: Any = Field(None, exclude=True, description="The client's own reading of the content; unused.")
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class FunctionDefinition(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = Field(None, description="The schema is always enforced.")


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: FunctionName


class ChatRequest(GenerationRequest, TemplateOptions):
    messages: list[ChatMessage] = Field(
        min_length=1, description="The conversation, ending with the message to answer."
    )
    max_tokens: int | None = sampling_field("max_tokens", "Default: up to the end of the context.")
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Return the log-probability of each generated token.")
    top_logprobs: int | None = sampling_field(
        "logprobs", help="Also return this many of the most probable tokens at each position."
    )
    response_format: ResponseFormat | None = Field(None, description="The format of the output: text or JSON.")
    tools: Annotated[list[Tool], Field(max_length=128)] | None = Field(
        None, description="Functions that the model can call."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="Whether the model can (auto) or must (required) call a function, or which one. Default auto."
    )
    parallel_tool_calls: bool | None = Field(None, description="Allow several calls in one answer. Default true.")
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Effort = Field(None, description="A variable of the chat template.")
    verbosity: Verbosity = None

    audio: None = None
    function_call: None = None
    functions: None = None
    prediction: None = None
    web_search_options: None = None


# The Responses API: what the official client sends for text and functions


class ResponsePart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = Field(None, description="Accepted as part of an earlier answer; ignored.")


class ResponseImage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["input_image"]
    image_url: str = Field(
        description="data:image/png;base64,…, or an address in a domain that the server fetches from."
    )
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Accepted; a model has one resolution, which it always uses."
    )
    file_id: None = None


class ResponseMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[ResponsePart | ResponseImage, Field(discriminator="type")]]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: None = None


class ReasoningText(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(BaseModel):
    """The reasoning of an earlier answer, which belongs to the message or call after it."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class FunctionCall(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    namespace: None = None
    caller: None = None


class FunctionCallOutput(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ResponsePart]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ResponseFunction(FunctionDefinition):
    type: Literal["function"]


class ResponseNamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    name: str


class ResponseJsonSchema(JsonSchema):
    type: Literal["json_schema"]


class ResponseText(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Annotated[TextFormat | JsonObjectFormat | ResponseJsonSchema, Field(discriminator="type")] | None = None
    verbosity: Verbosity = None


class ResponseStreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_obfuscation: Literal[False] | None = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""What to add to an answer. Answers here have log-probabilities only; there is nothing of the others to add."""


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="forbid")
    effort: Effort = Field(None, description="A variable of the chat template.")
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


def _item_type(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[ResponseMessage, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(_item_type),
]


class ResponsesRequest(Request):
    input: str | list[InputItem] = Field(
        description="A text, or the conversation: messages, reasoning, function calls and their outputs."
    )
    instructions: str | None = Field(None, description="A system message to put before the conversation.")
    max_output_tokens: int | None = sampling_field("max_tokens", "Default: up to the end of the context.")
    temperature: float | None = sampling_field("temperature", "Default: the model's own, else 1.")
    top_p: float | None = sampling_field("top_p")
    top_logprobs: int | None = sampling_field("logprobs")
    include: list[Includable] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Returned with the answer.")
    parallel_tool_calls: bool | None = None
    tools: Annotated[list[ResponseFunction], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | None = None
    text: ResponseText | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: cut the start of a conversation that does not fit the context."
    )
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = Field(None, description="Answers are never stored.")
    background: Literal[False] | None = None
    user: str | None = Field(None, max_length=512)
    service_tier: ServiceTier = None
    reasoning: Reasoning | None = None
    prompt_cache_key: Hint = None
    prompt_cache_retention: Hint = None
    safety_identifier: Hint = None

    # extensions to OpenAI's API
    seed: int | None = sampling_field("seed")
    top_k: int | None = sampling_field("top_k")
    min_p: float | None = sampling_field("min_p")
    typical_p: float | None = sampling_field("typical_p")
    repetition_penalty: float | None = sampling_field("repetition_penalty")
    ignore_eos: bool | None = sampling_field("ignore_eos")
    cache_prompt: bool | None = sampling_field("cache_prompt")
    regex: str | None = _REGEX
    grammar: str | None = _GRAMMAR
    choice: list[str] | None = _CHOICE
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template, such as enable_thinking."
    )

    access_programs: None = None
    background_options: None = None
    context_management: None = None
    conversation: None = None
    image: None = None
    max_tool_calls: None = None
    moderation: None = None
    previous_response_id: None = None
    prompt: None = None
    prompt_cache_options: None = None


class EmbeddingsRequest(Request):
    input: str | list[str] | list[Id] | list[list[Id]] = Field(description="One or more texts or lists of token ids.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: encoded little-endian float32."
    )
    dimensions: int | None = Field(None, ge=1, description="Must be the width of the model.")
    user: str | None = Field(None, max_length=512)


class TokenizeRequest(Request, TemplateOptions):
    """A text (prompt), or a conversation (messages) to render with the chat template."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Put the tokens around a prompt that the tokenizer adds, as completions do. Default true."
    )
    return_token_strs: bool = False


class DetokenizeRequest(Request):
    tokens: list[Id]


# Responses ------------------------------------------------------------------------------------------------------------


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(
        None, description="What a model that answers in channels (gpt-oss) has thought before the answer."
    )
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gptsmith"
    loaded: bool = Field(description="False: it is loaded when it is first requested.")
    max_model_len: int | None = Field(None, description="Context length in tokens, once the model is loaded.")
    parent: str | None = Field(
        None, description="For an adapter, its model; for an alias, the model or adapter it stands for."
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetails


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    prompt: str
