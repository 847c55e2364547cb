// Workers without a model, for measuring a router by itself: real sockets and the very bytes that a Tandem worker
// sends, rendered once at start, so that a request costs them a few microseconds.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"

namespace boost::asio {
class io_context;
}

namespace tandem::bench {

struct MockFleetOptions {
  int num_prefill = 0;
  int num_decode = 1;
  // A request is answered with answers[(sum of its prompt's ids) % answers.size()]: whoever knows the prompt knows the
  // answer, so an answer that went to another client is noticed.
  std::vector<std::vector<TokenId>> answers;
  // Between two tokens of an answer. Zero: the whole answer is there at once, and leaves in one write.
  std::chrono::microseconds token_gap{0};
};

// All workers run on the thread that runs `io`, each on a port of its own. Decode workers know pushes: such a request
// gets an address first, and its tokens when a prefill worker was sent that address.
class MockFleet {
 public:
  static Result<std::unique_ptr<MockFleet>> listen(boost::asio::io_context& io, MockFleetOptions options);
  ~MockFleet();
  MockFleet(const MockFleet&) = delete;
  MockFleet& operator=(const MockFleet&) = delete;

  std::vector<uint16_t> prefill_ports() const;
  std::vector<uint16_t> decode_ports() const;

  struct Impl;  // public for the connections in mock_fleet.cc only

 private:
  explicit MockFleet(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

// Index of the answer to a completion request with this body (its prompt as ids); -1 if it has no such prompt.
int64_t answer_of_body(std::string_view body, size_t num_answers);

}  // namespace tandem::bench
