#include "src/api/api_keys.h"

#include <algorithm>

namespace tandem::api {
namespace {

bool equal_in_constant_time(const Hash256& a, const Hash256& b) {
  unsigned difference = 0;
  for (size_t i = 0; i < a.bytes.size(); ++i) difference |= static_cast<unsigned>(a.bytes[i] ^ b.bytes[i]);
  return difference == 0;
}

}  // namespace

ApiKeys::ApiKeys(const std::vector<std::string>& keys) {
  for (const std::string& key : keys) digests_.push_back(Sha256().add(key).finish());
}

Status ApiKeys::check(const HttpRequest& request) const {
  if (digests_.empty()) return {};
  constexpr std::string_view kScheme = "Bearer ";
  const std::string* header = find_header(request.headers, "authorization");
  const auto is_authorization = [](const auto& entry) { return equal_ignoring_case(entry.first, "authorization"); };
  if (std::count_if(request.headers.begin(), request.headers.end(), is_authorization) > 1) {
    return make_error(ErrorKind::kInvalidArgument, "more than one Authorization header");
  }
  const bool has_key = header != nullptr && header->size() > kScheme.size() &&
                       equal_ignoring_case(header->substr(0, kScheme.size()), kScheme);
  const std::string_view key = has_key ? std::string_view(*header).substr(kScheme.size()) : std::string_view();
  const Hash256 digest = Sha256().add(key).finish();
  bool matches = false;
  for (const Hash256& known : digests_) matches |= equal_in_constant_time(known, digest);
  if (has_key && matches) return {};
  Error error =
      make_error(ErrorKind::kUnauthenticated, "this server wants a valid API key as 'Authorization: Bearer <key>'");
  if (has_key) error.code = "invalid_api_key";
  return error;
}

}  // namespace tandem::api
