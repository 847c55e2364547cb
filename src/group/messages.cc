#include "src/group/messages.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

namespace tandem::group {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxInt = std::numeric_limits<int64_t>::max();

// Takes the fields of one object; remembers the first thing that is wrong.
class Fields {
 public:
  explicit Fields(const Json& object) : object_(object) {
    if (!object.is_object()) fail("no object");
  }

  int64_t integer(const char* name, int64_t low, int64_t high) {
    const Json* const value = find(name);
    if (value == nullptr) return low;
    const bool fits = value->is_number_unsigned() ? value->get<uint64_t>() <= static_cast<uint64_t>(kMaxInt)
                                                  : value->is_number_integer();
    if (!fits || value->get<int64_t>() < low || value->get<int64_t>() > high) {
      fail(fmt::format("{} is no integer of {} … {}", name, low, high));
      return low;
    }
    return value->get<int64_t>();
  }

  uint64_t number(const char* name) {
    const Json* const value = find(name);
    if (value == nullptr) return 0;
    if (value->is_number_unsigned()) return value->get<uint64_t>();
    fail(fmt::format("{} is no unsigned number", name));
    return 0;
  }

  bool flag(const char* name) {
    const Json* const value = find(name);
    if (value == nullptr) return false;
    if (!value->is_boolean()) fail(fmt::format("{} is neither true nor false", name));
    return value->is_boolean() && value->get<bool>();
  }

  std::string text(const char* name, int64_t max_bytes) {
    const Json* const value = find(name);
    return value == nullptr ? "" : text_of(*value, name, max_bytes);
  }

  std::string text_of(const Json& value, const char* name, int64_t max_bytes) {
    const std::string* const text = value.get_ptr<const std::string*>();
    if (text == nullptr || std::ssize(*text) > max_bytes) {
      fail(fmt::format("{} is no text of at most {} bytes", name, max_bytes));
      return "";
    }
    return *text;
  }

  // Null if it is no array of at most `max` elements.
  const Json* list(const char* name, int64_t max) {
    const Json* const value = find(name);
    if (value == nullptr) return nullptr;
    if (value->is_array() && std::ssize(*value) <= max) return value;
    fail(fmt::format("{} is no list of at most {} elements", name, max));
    return nullptr;
  }

  const Json* find(const char* name) {
    if (fault_) return nullptr;
    const auto found = object_.find(name);
    ++num_taken_;
    if (found != object_.end()) return &*found;
    fail(fmt::format("{} is missing", name));
    return nullptr;
  }

  void fail(std::string fault) {
    if (!fault_) fault_ = std::move(fault);
  }
  void take(const Fields& part) {
    if (const Status status = part.finish(); !status.ok()) fail(status.error().message);
  }

  Status finish() const {
    if (fault_) return make_error(ErrorKind::kDataLoss, "{}", *fault_);
    if (num_taken_ != object_.size()) {
      return make_error(ErrorKind::kDataLoss, "{} fields instead of {}", object_.size(), num_taken_);
    }
    return {};
  }

 private:
  const Json& object_;
  size_t num_taken_ = 0;
  std::optional<std::string> fault_;
};

Json region_json(const comm::RegionAddress& region) {
  return {{"pid", region.pid}, {"fd", region.fd}, {"bytes", region.bytes}};
}

comm::RegionAddress read_region(Fields& fields, const char* name) {
  comm::RegionAddress region;
  const Json* const value = fields.find(name);
  if (value == nullptr) return region;
  Fields part(*value);
  region.pid = static_cast<pid_t>(part.integer("pid", 1, std::numeric_limits<pid_t>::max()));
  region.fd = static_cast<int>(part.integer("fd", 0, std::numeric_limits<int>::max()));
  region.bytes = part.integer("bytes", 1, kMaxInt / 2);
  fields.take(part);
  return region;
}

Json window_json(const WindowAddress& address) {
  return {{"region", region_json(address.region)},
          {"bell", region_json(address.bell)},
          {"stamp", address.stamp},
          {"network", address.network}};
}

WindowAddress read_window(Fields& fields, const Json& value) {
  Fields part(value);
  WindowAddress address;
  address.region = read_region(part, "region");
  address.bell = read_region(part, "bell");
  address.stamp = part.number("stamp");
  address.network = part.text("network", kMaxNetworkBytes);
  fields.take(part);
  return address;
}

// --- one overload of put_fields and one of get_fields per message ---

Json facts_json(const std::vector<Fact>& facts) {
  Json json = Json::array();
  for (const Fact& fact : facts) json.push_back({fact.name, fact.value});
  return json;
}

std::vector<Fact> read_facts(Fields& fields, const char* name) {
  std::vector<Fact> out;
  const Json* const facts = fields.list(name, kMaxFacts);
  for (const Json& fact : facts == nullptr ? Json::array() : *facts) {
    if (!fact.is_array() || fact.size() != 2) {
      fields.fail("a fact is no pair");
      break;
    }
    out.push_back({fields.text_of(fact[0], "the name of a fact", kMaxFactBytes),
                   fields.text_of(fact[1], "the value of a fact", kMaxFactBytes)});
  }
  return out;
}

void put_fields(Json& json, const JoinMessage& m) {
  json.update({{"protocol", m.protocol},
               {"rank", m.rank},
               {"data", m.shape.data},
               {"tensor", m.shape.tensor},
               {"incarnation", m.incarnation},
               {"attempt", m.attempt},
               {"pid", m.pid},
               {"node", m.node},
               {"http_address", m.http_address},
               {"rank_timeout_us", m.rank_timeout_us},
               {"last_epoch", m.last_epoch}});
  json["facts"] = facts_json(m.facts);
  json["options"] = facts_json(m.options);
}

void get_fields(Fields& fields, JoinMessage& m) {
  m.protocol = fields.integer("protocol", 0, kMaxInt);
  m.rank = static_cast<int32_t>(fields.integer("rank", std::numeric_limits<int32_t>::min(),
                                               std::numeric_limits<int32_t>::max()));
  m.shape.data = static_cast<int32_t>(fields.integer("data", 1, kMaxRanks));
  m.shape.tensor = static_cast<int32_t>(fields.integer("tensor", 1, kMaxRanks));
  m.incarnation = fields.number("incarnation");
  m.attempt = fields.number("attempt");
  m.pid = fields.integer("pid", 1, std::numeric_limits<pid_t>::max());
  m.node = fields.text("node", kMaxNodeBytes);
  m.http_address = fields.text("http_address", kMaxTextBytes);
  m.rank_timeout_us = fields.integer("rank_timeout_us", 1, kMaxInt);
  m.last_epoch = static_cast<uint64_t>(fields.integer("last_epoch", 0, kMaxInt / 2));
  m.facts = read_facts(fields, "facts");
  m.options = read_facts(fields, "options");
}

void put_fields(Json& json, const RefusedMessage& m) { json.update({{"lasting", m.lasting}, {"why", m.why}}); }
void get_fields(Fields& fields, RefusedMessage& m) {
  m.lasting = fields.flag("lasting");
  m.why = fields.text("why", kMaxTextBytes);
}

void put_epoch(Json& json, Epoch epoch) { json["epoch"] = epoch.value; }
Epoch get_epoch(Fields& fields) { return Epoch(static_cast<uint64_t>(fields.integer("epoch", 0, kMaxInt))); }

void put_fields(Json& json, const FormMessage& m) {
  put_epoch(json, m.epoch);
  json["nodes"] = m.nodes;
}
void get_fields(Fields& fields, FormMessage& m) {
  m.epoch = get_epoch(fields);
  const Json* const nodes = fields.list("nodes", kMaxRanks);
  for (const Json& node : nodes == nullptr ? Json::array() : *nodes) {
    m.nodes.push_back(fields.text_of(node, "a node", kMaxNodeBytes));
  }
}

void put_fields(Json& json, const WindowMessage& m) {
  put_epoch(json, m.epoch);
  json["window"] = window_json(m.address);
}
void get_fields(Fields& fields, WindowMessage& m) {
  m.epoch = get_epoch(fields);
  if (const Json* const window = fields.find("window"); window != nullptr) m.address = read_window(fields, *window);
}

void put_fields(Json& json, const MapMessage& m) {
  put_epoch(json, m.epoch);
  Json windows = Json::array();
  for (const WindowAddress& address : m.windows) windows.push_back(window_json(address));
  json["windows"] = std::move(windows);
}
void get_fields(Fields& fields, MapMessage& m) {
  m.epoch = get_epoch(fields);
  const Json* const windows = fields.list("windows", kMaxRanks);
  for (const Json& window : windows == nullptr ? Json::array() : *windows) {
    m.windows.push_back(read_window(fields, window));
  }
}

void put_fields(Json& json, const MappedMessage& m) { put_epoch(json, m.epoch); }
void get_fields(Fields& fields, MappedMessage& m) { m.epoch = get_epoch(fields); }

void put_fields(Json& json, const OpenMessage& m) { put_epoch(json, m.epoch); }
void get_fields(Fields& fields, OpenMessage& m) { m.epoch = get_epoch(fields); }

void put_fields(Json& json, const EndedMessage& m) {
  put_epoch(json, m.epoch);
  json.update({{"fenced", m.fenced}, {"why", m.why}});
}
void get_fields(Fields& fields, EndedMessage& m) {
  m.epoch = get_epoch(fields);
  m.fenced = fields.flag("fenced");
  m.why = fields.text("why", kMaxTextBytes);
}

void put_fields(Json& json, const FaultMessage& m) {
  put_epoch(json, m.epoch);
  json.update({{"suspect", m.suspect}, {"why", m.why}});
}
void get_fields(Fields& fields, FaultMessage& m) {
  m.epoch = get_epoch(fields);
  m.suspect = static_cast<int32_t>(fields.integer("suspect", -1, kMaxRanks - 1));
  m.why = fields.text("why", kMaxTextBytes);
}

void put_fields(Json& json, const LeaveMessage& m) { json["why"] = m.why; }
void get_fields(Fields& fields, LeaveMessage& m) { m.why = fields.text("why", kMaxTextBytes); }

void put_fields(Json& json, const BeatMessage& m) { json["text"] = m.text; }
void get_fields(Fields& fields, BeatMessage& m) { m.text = fields.text("text", kMaxTextBytes); }

constexpr const char* kNames[] = {"join",   "refused", "form",  "window", "map", "mapped",
                                  "open",   "ended",   "fault", "leave",  "beat"};
static_assert(std::size(kNames) == std::variant_size_v<Message>);

template <size_t I = 0>
Result<Message> decode_as(const std::string& name, Fields& fields) {
  if constexpr (I == std::variant_size_v<Message>) {
    return make_error(ErrorKind::kDataLoss, "a message of unknown type \"{}\"", name.substr(0, 40));
  } else {
    if (name != kNames[I]) return decode_as<I + 1>(name, fields);
    std::variant_alternative_t<I, Message> message;
    get_fields(fields, message);
    if (const Status status = fields.finish(); !status.ok()) {
      return make_error(ErrorKind::kDataLoss, "a {} message: {}", name, status.error().message);
    }
    return Message(std::move(message));
  }
}

}  // namespace

const char* message_name(const Message& message) { return kNames[message.index()]; }

std::string encode_message(const Message& message) {
  Json json = Json::object();
  json["type"] = message_name(message);
  std::visit([&json](const auto& m) { put_fields(json, m); }, message);
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Result<Message> decode_message(std::string_view text) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return make_error(ErrorKind::kDataLoss, "a message that is not JSON");
  Fields fields(json);
  const std::string name = fields.text("type", kMaxTextBytes);
  // Another version may have other fields, and shall still be refused by a sentence that one can understand.
  if (const auto protocol = json.is_object() ? json.find("protocol") : json.end();
      name == "join" && protocol != json.end() && protocol->is_number_integer() && *protocol != kProtocolVersion) {
    JoinMessage join;
    join.protocol = protocol->get<int64_t>();
    return Message(std::move(join));
  }
  if (name.empty()) {
    const Status status = fields.finish();
    return status.ok() ? make_error(ErrorKind::kDataLoss, "a message without a type") : status.error();
  }
  return decode_as(name, fields);
}

std::string clip_text(std::string text) {
  if (std::ssize(text) <= kMaxTextBytes) return text;
  size_t end = static_cast<size_t>(kMaxTextBytes) - 3;  // "…" has three bytes
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "…";
}

}  // namespace tandem::group
