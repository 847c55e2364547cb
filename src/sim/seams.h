// Where a test may put something between the parts of a simulated worker, to prove that the invariants notice it. In
// an ordinary run every one is empty.
#pragma once

#include <functional>
#include <memory>

#include "src/comm/messenger.h"
#include "src/sim/legs.h"
#include "src/transfer/agent.h"

namespace tandem::sim {

struct Seams {
  // Between the engine and its agent.
  std::function<std::unique_ptr<transfer::Agent>(std::unique_ptr<transfer::Agent>)> agent;
  // Between the agent and the network: what it sends, and what comes.
  std::function<std::unique_ptr<comm::Messenger>(std::unique_ptr<comm::Messenger>)> messenger;
  std::function<std::unique_ptr<comm::MessageHandler>(comm::MessageHandler&)> handler;
  // Between the router and its legs; the argument outlives the result.
  std::function<std::unique_ptr<Legs>(Legs&)> legs;
  // A new process repeats the incarnation and the nonces of the one before.
  bool repeat_incarnation = false;
  // Workers with both roles keep no room for what ends the waiting of others.
  bool no_room = false;
};

}  // namespace tandem::sim
