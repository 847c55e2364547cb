#include "src/text/textcore_call.h"

#include <algorithm>

#include "src/base/check.h"

namespace tandem::text::internal {

tc_limits to_c_limits(const EncodeLimits& limits) {
  // The library reads the flag as an atomic byte.
  static_assert(sizeof(std::atomic<bool>) == sizeof(bool) && std::atomic<bool>::is_always_lock_free);
  return {static_cast<size_t>(std::max<int64_t>(limits.max_tokens, 0)), reinterpret_cast<const bool*>(limits.stop)};
}

Error to_error(int32_t status, const Bytes& message, std::string param) {
  CHECK_NE(status, static_cast<int32_t>(TC_OK));
  Error error;
  error.message = std::string(message.view());
  switch (status) {
    case TC_INVALID:
      error.kind = ErrorKind::kInvalidArgument;
      error.param = std::move(param);
      break;
    case TC_TOO_LONG:
      error.kind = ErrorKind::kInvalidArgument;
      error.param = std::move(param);
      error.code = "context_length_exceeded";
      break;
    case TC_STOPPED:
      error.kind = ErrorKind::kAborted;
      break;
    case TC_BAD_FILE:
      error.kind = ErrorKind::kDataLoss;
      break;
    case TC_UNSUPPORTED:
      error.kind = ErrorKind::kUnsupported;
      break;
    default:
      error.kind = ErrorKind::kInternal;
      break;
  }
  return error;
}

void check_ok(int32_t status, const Bytes& message) {
  if (status != TC_OK) fail_check(__FILE__, __LINE__, message.view());
}

}  // namespace tandem::text::internal
