// The "messages" of a chat request and what goes to the template with them.
#include <nlohmann/json.hpp>
#include <set>

#include "src/api/api_error.h"
#include "src/api/openai_request.h"
#include "src/api/request_fields.h"

namespace tandem::api {
namespace {

constexpr size_t kMaxTemplateKwargs = 32;
constexpr size_t kMaxTemplateKwargBytes = 4096;

// Names that the renderer itself sets; a client that sets them would change the meaning of the conversation.
bool is_reserved_kwarg(std::string_view name) {
  for (const char* reserved : {"messages", "tools", "documents", "chat_template", "tokenize", "return_dict",
                               "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"}) {
    if (name == reserved) return true;
  }
  return false;
}

class MessageReader {
 public:
  Result<Json> read(const Json& messages) {
    Json out = Json::array();
    for (size_t i = 0; i < messages.size(); ++i) {
      path_ = fmt::format("messages[{}]", i);
      if (!messages[i].is_object()) return fault("", "invalid_type", "must be an object");
      TANDEM_ASSIGN(Json message, read_message(messages[i]));
      out.push_back(std::move(message));
    }
    return out;
  }

 private:
  Error fault(std::string_view field, std::string code, std::string_view why) const {
    const std::string param = path_ + std::string(field);
    return field_error(param, std::move(code), fmt::format("'{}' {}", param, why));
  }

  Result<Json> read_message(const Json& in) {
    const auto role_at = in.find("role");
    if (role_at == in.end()) return fault(".role", "missing_required_parameter", "is missing");
    if (!role_at->is_string()) return fault(".role", "invalid_type", "must be a string");
    std::string role = role_at->get<std::string>();
    if (role == "developer") role = "system";  // OpenAI's newer name, which templates do not know
    if (role != "system" && role != "user" && role != "assistant" && role != "tool") {
      return fault(".role", "invalid_value",
                   fmt::format("is {}, must be system, developer, user, assistant or tool", quote_for_message(role)));
    }
    Json out = Json::object();
    out["role"] = role;
    const auto calls = in.find("tool_calls");
    const bool has_calls = role == "assistant" && calls != in.end() && !calls->is_null();
    TANDEM_ASSIGN(out["content"], read_content(in, has_calls));
    for (const char* name : {"name", "reasoning_content", "reasoning"}) {
      const auto value = in.find(name);
      if (value == in.end() || value->is_null()) continue;
      if (!value->is_string()) return fault(std::string(".") + name, "invalid_type", "must be a string");
      // Templates know the older of the two names.
      out[std::string_view(name) == "reasoning" ? "reasoning_content" : name] = *value;
    }
    if (has_calls) {
      TANDEM_ASSIGN(out["tool_calls"], read_tool_calls(*calls));
    }
    if (role == "tool") {
      const auto id = in.find("tool_call_id");
      if (id == in.end() || !id->is_string() || !call_ids_.contains(id->get<std::string>())) {
        return fault(".tool_call_id", "invalid_value", "must be the id of a tool call in an earlier message");
      }
      out["tool_call_id"] = *id;
    }
    return out;
  }

  // A string, or an array of text parts, which are joined by line breaks.
  Result<Json> read_content(const Json& in, bool may_be_null) const {
    const auto content = in.find("content");
    if (content == in.end() || content->is_null()) {
      if (may_be_null) return Json("");
      return fault(".content", "missing_required_parameter", "is missing or null");
    }
    if (content->is_string()) return *content;
    if (!content->is_array()) return fault(".content", "invalid_type", "must be a string or an array of parts");
    std::string text;
    for (size_t j = 0; j < content->size(); ++j) {
      const Json& part = (*content)[j];
      const std::string field = fmt::format(".content[{}]", j);
      if (!part.is_object()) return fault(field, "invalid_type", "must be an object");
      const auto type = part.find("type");
      if (type == part.end() || *type != "text") {
        return fault(field, "unsupported_parameter", "has a type other than \"text\", the only one this model reads");
      }
      const auto value = part.find("text");
      if (value == part.end() || !value->is_string()) return fault(field + ".text", "invalid_type", "must be a string");
      if (j > 0) text += '\n';
      text += value->get_ref<const std::string&>();
    }
    return Json(std::move(text));
  }

  // Arguments become objects, as templates expect; clients send them as text.
  Result<Json> read_tool_calls(const Json& calls) {
    if (!calls.is_array()) return fault(".tool_calls", "invalid_type", "must be an array");
    Json out = Json::array();
    for (size_t j = 0; j < calls.size(); ++j) {
      const std::string field = fmt::format(".tool_calls[{}]", j);
      const Json& call = calls[j];
      const bool is_call = call.is_object() && call.contains("id") && call["id"].is_string() &&
                           call.contains("function") && call["function"].is_object() &&
                           call["function"].contains("name") && call["function"]["name"].is_string();
      if (!is_call) return fault(field, "invalid_value", "must have an 'id' and a 'function' with a 'name'");
      Json function = Json::object();
      function["name"] = call["function"]["name"];
      Json arguments = call["function"].contains("arguments") ? call["function"]["arguments"] : Json::object();
      if (const std::string* text = arguments.get_ptr<const std::string*>()) {
        Result<Json> parsed = parse_strict_json(text->empty() ? std::string("{}") : *text, "tool arguments");
        if (!parsed.ok()) return fault(field + ".function.arguments", "invalid_value", "must be JSON");
        arguments = std::move(*parsed);
      }
      if (!arguments.is_object()) return fault(field + ".function.arguments", "invalid_type", "must be an object");
      function["arguments"] = std::move(arguments);
      out.push_back({{"id", call["id"]}, {"type", "function"}, {"function", std::move(function)}});
      call_ids_.insert(call["id"].get<std::string>());
    }
    return out;
  }

  std::string path_;
  std::set<std::string> call_ids_;  // of the messages so far
};

Json read_template_kwargs(RequestFields& fields) {
  const Json* kwargs = fields.object("chat_template_kwargs");
  if (kwargs == nullptr) return Json::object();
  if (kwargs->size() > kMaxTemplateKwargs) {
    fields.fail_value("chat_template_kwargs",
                      fmt::format("has {} members, the limit is {}", kwargs->size(), kMaxTemplateKwargs));
  }
  for (const auto& [name, value] : kwargs->items()) {
    if (is_reserved_kwarg(name)) {
      fields.fail_value("chat_template_kwargs", fmt::format("must not set {}", quote_for_message(name)));
    }
    const std::string* text = value.get_ptr<const std::string*>();
    const size_t bytes = name.size() + (text == nullptr ? 0 : text->size());
    if (value.is_structured() || bytes > kMaxTemplateKwargBytes) {
      fields.fail_value("chat_template_kwargs",
                        fmt::format("must have scalars of at most {} bytes", kMaxTemplateKwargBytes));
    }
  }
  return *kwargs;
}

}  // namespace

Result<ChatPrompt> parse_chat_prompt(const Json& body) {
  RequestFields fields(body);
  ChatPrompt chat;
  const Json* messages = fields.array("messages", kMaxMessages);
  if (fields.failed()) return fields.error();
  if (messages == nullptr) {
    return field_error("messages", "missing_required_parameter", "you must give 'messages'");
  }
  if (messages->empty()) return field_error("messages", "empty_array", "'messages' is empty");
  TANDEM_ASSIGN(const Json checked, MessageReader().read(*messages));
  chat.messages = checked.dump();
  chat.template_kwargs = read_template_kwargs(fields).dump();
  chat.add_generation_prompt = fields.boolean("add_generation_prompt").value_or(true);
  chat.continue_final_message = fields.boolean("continue_final_message").value_or(false);
  if (chat.add_generation_prompt && chat.continue_final_message) {
    fields.fail_value("continue_final_message", "and 'add_generation_prompt' cannot both be true");
  }
  if (fields.failed()) return fields.error();
  return chat;
}

}  // namespace tandem::api
