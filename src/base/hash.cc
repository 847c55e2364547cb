#include "src/base/hash.h"

#include <openssl/evp.h>

#include "src/base/check.h"

namespace tandem {

std::string Hash256::hex() const {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (uint8_t byte : bytes) {
    text.push_back(kDigits[byte >> 4]);
    text.push_back(kDigits[byte & 15]);
  }
  return text;
}

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  CHECK(context_ != nullptr);
  CHECK_EQ(EVP_DigestInit_ex(static_cast<EVP_MD_CTX*>(context_), EVP_sha256(), nullptr), 1);
}

Sha256::~Sha256() { EVP_MD_CTX_free(static_cast<EVP_MD_CTX*>(context_)); }

Sha256& Sha256::add(std::span<const std::byte> data) {
  CHECK_EQ(EVP_DigestUpdate(static_cast<EVP_MD_CTX*>(context_), data.data(), data.size()), 1);
  return *this;
}

Hash256 Sha256::finish() {
  Hash256 hash;
  unsigned int length = 0;
  CHECK_EQ(EVP_DigestFinal_ex(static_cast<EVP_MD_CTX*>(context_), hash.bytes.data(), &length), 1);
  CHECK_EQ(length, 32U);
  return hash;
}

}  // namespace tandem
