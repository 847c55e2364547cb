#include "src/model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "src/model/json_fields.h"

namespace tandem::model {
namespace {

using kernels::DType;

struct FileType {
  std::string_view name;
  uint64_t bits;
  std::optional<DType> kernel_dtype;
};

constexpr FileType kFileTypes[] = {
    {"BF16", 16, DType::kBf16},
    {"F32", 32, DType::kF32},
    {"F16", 16, DType::kF16},
    {"F8_E4M3", 8, DType::kF8E4M3},
    {"I8", 8, DType::kI8},
    {"U8", 8, DType::kU8},
    {"I32", 32, DType::kI32},
    {"I64", 64, DType::kI64},
    {"BOOL", 8, {}},
    {"I16", 16, {}},
    {"U16", 16, {}},
    {"U32", 32, {}},
    {"U64", 64, {}},
    {"F64", 64, {}},
    {"F8_E5M2", 8, {}},
    {"F8_E8M0", 8, {}},
    {"F8_E4M3FNUZ", 8, {}},
    {"F8_E5M2FNUZ", 8, {}},
    {"F4", 4, {}},
    {"F6_E2M3", 6, {}},
    {"F6_E3M2", 6, {}},
    {"C64", 64, {}},
};

const FileType* find_file_type(std::string_view name) {
  const FileType* type =
      std::find_if(std::begin(kFileTypes), std::end(kFileTypes), [&](const FileType& t) { return t.name == name; });
  return type == std::end(kFileTypes) ? nullptr : type;
}

struct HeaderEntry {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
  std::vector<uint64_t> offsets;
  unsigned seen_fields = 0;  // bits 1 dtype, 2 shape, 4 data_offsets
};

// Collects the header as the JSON parser meets it: no tree is built, nesting is bounded by the states, and a duplicate
// name or field is seen as such. Every method returns false to stop at the first fault.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<HeaderEntry> entries;
  std::string fault;

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(int64_t value) override { return refuse(fmt::format("holds the negative number {}", value)); }
  bool number_float(double, const std::string& text) override {
    return refuse(fmt::format("holds the number {}, which is not an integer below 2^64", printable(text)));
  }
  bool binary(nlohmann::json::binary_t&) override { return unexpected("binary data"); }

  bool number_unsigned(uint64_t value) override {
    if (state_ != State::kShape && state_ != State::kOffsets) return unexpected("a number");
    std::vector<uint64_t>& list = state_ == State::kShape ? entries.back().shape : entries.back().offsets;
    const size_t limit = state_ == State::kShape ? kMaxTensorRank : 2;
    if (list.size() == limit) {
      return refuse(fmt::format("holds more than {} {}", limit,
                                state_ == State::kShape ? "dimensions in a shape" : "data_offsets"));
    }
    list.push_back(value);
    return true;
  }

  bool string(std::string& value) override {
    if (state_ == State::kMetadata) return true;
    if (state_ != State::kDType) return unexpected("a string");
    entries.back().dtype = std::move(value);
    state_ = State::kTensor;
    return true;
  }

  bool start_object(size_t) override {
    if (state_ == State::kStart) return enter(State::kTop);
    if (state_ == State::kNamed) return enter(State::kTensor);
    if (state_ == State::kMetadataNamed) return enter(State::kMetadata);
    return unexpected("an object");
  }

  bool end_object() override {
    if (state_ == State::kTop) return enter(State::kEnd);
    if (state_ == State::kTensor && entries.back().seen_fields != 7) {
      return refuse("lacks dtype, shape or data_offsets");
    }
    return enter(State::kTop);
  }

  bool start_array(size_t) override {
    if (state_ == State::kShapeNamed) return enter(State::kShape);
    if (state_ == State::kOffsetsNamed) return enter(State::kOffsets);
    return unexpected("a list");
  }

  bool end_array() override {
    if (state_ == State::kOffsets && entries.back().offsets.size() != 2) return refuse("needs two data_offsets");
    return enter(State::kTensor);
  }

  bool key(std::string& name) override {
    if (state_ == State::kMetadata) return true;
    if (state_ == State::kTensor) return field(name);
    if (state_ != State::kTop) return unexpected("a key");
    if (!names_.insert(name).second) return refuse(fmt::format("has the name \"{}\" twice", printable(name)));
    if (name == "__metadata__") return enter(State::kMetadataNamed);
    entries.push_back(HeaderEntry{std::move(name), "", {}, {}, 0});
    return enter(State::kNamed);
  }

  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& error) override {
    return refuse(fmt::format("is not valid JSON ({})", printable(error.what())));
  }

 private:
  enum class State : uint8_t {
    kStart,
    kTop,
    kEnd,
    kMetadataNamed,
    kMetadata,
    kNamed,
    kTensor,
    kDType,
    kShapeNamed,
    kShape,
    kOffsetsNamed,
    kOffsets  // inside entries.back()
  };

  bool enter(State state) {
    state_ = state;
    return true;
  }
  bool refuse(std::string text) {
    fault = std::move(text);
    if (state_ >= State::kNamed && state_ <= State::kOffsets) {
      fault += fmt::format(" (tensor \"{}\")", printable(entries.back().name));
    }
    return false;
  }
  bool unexpected(const char* what) { return refuse(fmt::format("holds {} at a place where none may be", what)); }

  bool field(const std::string& name) {
    const bool is_dtype = name == "dtype";
    const bool is_shape = name == "shape";
    if (!is_dtype && !is_shape && name != "data_offsets") {
      return refuse(fmt::format("has the unknown field \"{}\"", printable(name)));
    }
    const unsigned bit = is_dtype ? 1U : is_shape ? 2U : 4U;
    if ((entries.back().seen_fields & bit) != 0) return refuse(fmt::format("has the field \"{}\" twice", name));
    entries.back().seen_fields |= bit;
    return enter(is_dtype ? State::kDType : is_shape ? State::kShapeNamed : State::kOffsetsNamed);
  }

  State state_ = State::kStart;
  std::unordered_set<std::string> names_;
};

template <typename... Args>
Error damaged(const std::string& path, fmt::format_string<Args...> format, Args&&... args) {
  return make_error(ErrorKind::kDataLoss, "{}: {}; fetch the file again", path,
                    fmt::format(format, std::forward<Args>(args)...));
}

// Checks one entry against the data section and gives it its bytes.
Result<StoredTensor> check_entry(HeaderEntry& entry, std::span<const std::byte> data, const std::string& path) {
  const std::string name = printable(entry.name);
  const FileType* type = find_file_type(entry.dtype);
  if (type == nullptr) return damaged(path, "tensor \"{}\" has the unknown dtype \"{}\"", name, printable(entry.dtype));
  const uint64_t begin = entry.offsets[0];
  const uint64_t end = entry.offsets[1];
  if (begin > end || end > data.size()) {
    return damaged(path, "tensor \"{}\" has data_offsets [{}, {}], must be ascending and within {} bytes of data", name,
                   begin, end, data.size());
  }
  uint64_t bits = type->bits;
  std::vector<int64_t> shape;
  for (const uint64_t dim : entry.shape) {
    if (dim > static_cast<uint64_t>(INT64_MAX) || __builtin_mul_overflow(bits, dim, &bits)) {
      return damaged(path, "tensor \"{}\" has a shape whose size overflows 64 bits", name);
    }
    shape.push_back(static_cast<int64_t>(dim));
  }
  if (bits % 8 != 0 || bits / 8 != end - begin) {
    return damaged(path, "tensor \"{}\" is {} {} and needs {} bits, but its data_offsets [{}, {}] span {} bytes", name,
                   entry.dtype, shape_text(shape), bits, begin, end, end - begin);
  }
  return StoredTensor{std::move(entry.name),
                      type->name,
                      type->kernel_dtype,
                      std::move(shape),
                      data.subspan(begin, end - begin),
                      nullptr};
}

}  // namespace

int64_t StoredTensor::elements() const {
  int64_t product = 1;
  for (const int64_t dim : shape) product *= dim;
  return product;
}

std::string shape_text(std::span<const int64_t> shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

Result<std::vector<StoredTensor>> parse_safetensors(std::span<const std::byte> image, const std::string& path) {
  uint64_t header_bytes = 0;
  if (image.size() < sizeof header_bytes) {
    return damaged(path, "has {} bytes, a safetensors file has at least {}", image.size(), sizeof header_bytes);
  }
  std::memcpy(&header_bytes, image.data(), sizeof header_bytes);
  const uint64_t available = image.size() - sizeof header_bytes;
  if (header_bytes > kMaxSafetensorsHeaderBytes || header_bytes > available) {
    return damaged(path, "says its header has {} bytes, but at most {} are allowed and the file holds {}", header_bytes,
                   kMaxSafetensorsHeaderBytes, available);
  }
  const char* header = reinterpret_cast<const char*>(image.data()) + sizeof header_bytes;
  if (header_bytes == 0 || header[0] != '{') return damaged(path, "has a header that does not begin with '{{'");

  HeaderReader reader;
  const bool parsed = nlohmann::json::sax_parse(header, header + header_bytes, &reader);
  if (!parsed) return damaged(path, "has a header that {}", reader.fault);

  const std::span<const std::byte> data = image.subspan(sizeof header_bytes + header_bytes);
  std::sort(reader.entries.begin(), reader.entries.end(),
            [](const HeaderEntry& a, const HeaderEntry& b) { return a.offsets < b.offsets; });
  std::vector<StoredTensor> tensors;
  uint64_t expected_begin = 0;
  for (HeaderEntry& entry : reader.entries) {
    const uint64_t begin = entry.offsets[0];
    const uint64_t end = entry.offsets[1];
    TANDEM_ASSIGN(StoredTensor tensor, check_entry(entry, data, path));
    if (begin != expected_begin) {
      return damaged(path,
                     "tensor \"{}\" begins at byte {} of the data, must be {}: tensors may not overlap or leave holes",
                     printable(tensor.name), begin, expected_begin);
    }
    expected_begin = end;
    tensors.push_back(std::move(tensor));
  }
  if (expected_begin != data.size()) {
    return damaged(path, "holds {} bytes of data, but its tensors account for {}", data.size(), expected_begin);
  }
  return tensors;
}

}  // namespace tandem::model
