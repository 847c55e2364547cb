#include "src/text/textcore_call.h"

#include "src/base/check.h"

namespace tandem::text::internal {

Error to_error(int32_t status, const Bytes& message, std::string param) {
  CHECK_NE(status, static_cast<int32_t>(TC_OK));
  Error error;
  error.message = std::string(message.view());
  switch (status) {
    case TC_INVALID:
      error.kind = ErrorKind::kInvalidArgument;
      error.param = std::move(param);
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
