// The engine of a tensor rank that is not the first of its data rank: it has no scheduler and no requests, and computes
// its share of every batch that the first one orders. Lockstep brings it into each round.
#pragma once

#include <atomic>
#include <thread>

#include "src/engine/lockstep.h"
#include "src/kv/populator.h"
#include "src/model/model.h"
#include "src/tp/order_stream.h"

namespace tandem::engine {

class Follower {
 public:
  // All outlive this and belong to its thread once start() was called. `orders` is attached to the fabric by `lockstep`.
  Follower(model::Model& model, model::KvCache& cache, Lockstep& lockstep, tp::OrderReceiver& orders)
      : model_(model), cache_(cache), lockstep_(lockstep), orders_(orders) {}
  ~Follower() { stop(); }

  // Is told how much of the cache is in use; set before start().
  void attach(kv::Populator* populator) { populator_ = populator; }
  void start();
  void stop();

 private:
  void run();
  Status compute_round();

  model::Model& model_;
  model::KvCache& cache_;
  Lockstep& lockstep_;
  tp::OrderReceiver& orders_;
  kv::Populator* populator_ = nullptr;
  std::atomic<bool> is_stopping_ = false;
  std::thread thread_;
};

}  // namespace tandem::engine
