// How a broken invariant ends a run: it is thrown where it is seen.
#pragma once

#include <stdexcept>
#include <string>

namespace tandem::sim {

class Violation : public std::runtime_error {
 public:
  Violation(std::string invariant, const std::string& what)
      : std::runtime_error(invariant + ": " + what), invariant_(std::move(invariant)) {}
  // A short stable name such as "pinned-while-open"; "check" for a failed CHECK of production code.
  const std::string& invariant() const { return invariant_; }

 private:
  std::string invariant_;
};

}  // namespace tandem::sim
