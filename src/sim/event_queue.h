// Virtual time: events in the order of their times, equal times in the order they were made.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "src/base/check.h"
#include "src/base/clock.h"

namespace tandem::sim {

// Who handles an event. A frozen worker handles none until it thaws; a dead one's are dropped.
struct Owner {
  static constexpr int32_t kNobody = -1;
  int32_t node = kNobody;
  uint64_t incarnation = 0;  // 0: whoever runs at that place then
};

struct Event {
  int64_t at_us = 0;
  uint64_t order = 0;
  Owner owner;
  std::function<void()> run;
};

class EventQueue final : public Clock {
 public:
  int64_t now_us() const override { return now_us_; }
  bool empty() const { return heap_.empty(); }
  int64_t next_us() const { return heap_.front().at_us; }

  void add(int64_t at_us, Owner owner, std::function<void()> run) {
    push({std::max(at_us, now_us_), next_order_++, owner, std::move(run)});
  }
  // Keeps its order: those that were before it at the same time stay before it.
  void postpone(Event event, int64_t at_us) {
    event.at_us = at_us;
    push(std::move(event));
  }
  // Moves time to the next event and gives it.
  Event take() {
    std::pop_heap(heap_.begin(), heap_.end(), later);
    Event event = std::move(heap_.back());
    heap_.pop_back();
    CHECK_GE(event.at_us, now_us_);
    now_us_ = event.at_us;
    return event;
  }
  void advance_to(int64_t at_us) { now_us_ = std::max(now_us_, at_us); }

 private:
  static bool later(const Event& a, const Event& b) {
    return a.at_us != b.at_us ? a.at_us > b.at_us : a.order > b.order;
  }
  void push(Event event) {
    heap_.push_back(std::move(event));
    std::push_heap(heap_.begin(), heap_.end(), later);
  }

  int64_t now_us_ = 1'000'000;  // not 0, which means "none" where a deadline is meant
  uint64_t next_order_ = 1;
  std::vector<Event> heap_;
};

}  // namespace tandem::sim
