// Shared by the classes over the Rust library: conversions at the C boundary. Not for use outside this folder.
#pragma once

#include <textcore.h>

#include <string>
#include <string_view>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"
#include "src/text/tokenizer.h"

namespace tandem::text::internal {

inline tc_slice to_slice(std::string_view text) { return {reinterpret_cast<const uint8_t*>(text.data()), text.size()}; }

inline std::string_view to_view(tc_slice slice) { return {reinterpret_cast<const char*>(slice.data), slice.len}; }

tc_limits to_c_limits(const EncodeLimits& limits);

// An owned buffer of the library for the length of a call.
class Bytes {
 public:
  Bytes() = default;
  ~Bytes() { tc_bytes_free(bytes_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  tc_bytes* out() { return &bytes_; }
  std::string_view view() const { return {reinterpret_cast<const char*>(bytes_.data), bytes_.len}; }

 private:
  tc_bytes bytes_{};
};

class Ids {
 public:
  Ids() = default;
  ~Ids() { tc_ids_free(ids_); }
  Ids(const Ids&) = delete;
  Ids& operator=(const Ids&) = delete;
  tc_ids* out() { return &ids_; }
  std::vector<TokenId> take() const { return {ids_.data, ids_.data + ids_.len}; }

 private:
  tc_ids ids_{};
};

// The Error for a status other than TC_OK; `param` names the request's field at fault, where one is.
Error to_error(int32_t status, const Bytes& message, std::string param);

// Calls that can fail by a fault of the library only.
void check_ok(int32_t status, const Bytes& message);

}  // namespace tandem::text::internal
