// The keys of --api-key. Only their digests are kept; a check compares the digest of what was presented with all of
// them in constant time, so that its duration tells nothing about a key.
#pragma once

#include <string>
#include <vector>

#include "src/api/http_server.h"
#include "src/base/hash.h"

namespace tandem::api {

class ApiKeys {
 public:
  // Without keys every request passes.
  explicit ApiKeys(const std::vector<std::string>& keys);
  // Reads "Authorization: Bearer <key>". kUnauthenticated, with code "invalid_api_key" if a key was presented;
  // kInvalidArgument for two Authorization headers.
  Status check(const HttpRequest& request) const;

 private:
  std::vector<Hash256> digests_;
};

}  // namespace tandem::api
