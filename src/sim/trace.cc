#include "src/sim/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "src/base/result.h"

namespace tandem::sim {
namespace {

constexpr const char* kMessages[] = {"hello",  "refuse", "begin", "accept",    "pull",      "data",
                                     "commit", "ack",    "abort", "abort_ack", "heartbeat", "fault"};
constexpr const char* kTurns[] = {"worked", "idle", "stopped"};
constexpr const char* kKinds[] = {"expect", "pull", "send", "publish"};
constexpr const char* kLegs[] = {"decode", "prefill"};
constexpr const char* kPlans[] = {"push", "pull", "local"};

template <size_t N>
std::string name_of(const char* const (&names)[N], uint64_t index) {
  return index < N ? names[index] : fmt::format("{}", index);
}

}  // namespace

std::string outcome_name(uint64_t value) {
  return value == 0 ? "ok" : error_kind_name(static_cast<ErrorKind>(value - 1));
}

std::string Trace::line(const Record& r) {
  switch (r.what) {
    case What::kMessage:
      return fmt::format("message {} by connection {}", name_of(kMessages, r.b), r.a);
    case What::kAccept:
      return fmt::format("accepts connection {}", r.a);
    case What::kClosed:
      return fmt::format("hears that connection {} is closed", r.a);
    case What::kDuplicate:
      return fmt::format("FAULT {} will come twice by connection {}", name_of(kMessages, r.b), r.a);
    case What::kLose:
      return fmt::format("FAULT {} is lost on connection {}", name_of(kMessages, r.b), r.a);
    case What::kDamage:
      return fmt::format("FAULT {} is damaged on connection {}", name_of(kMessages, r.b), r.a);
    case What::kBreak:
      return fmt::format("FAULT connection {} breaks", r.a);
    case What::kTurn:
      return fmt::format("engine {}, {} sequences", name_of(kTurns, r.a), r.b);
    case What::kOpen:
      return fmt::format("opens transfer {} ({})", r.a, name_of(kKinds, r.b));
    case What::kDone:
      return fmt::format("transfer {} is done: {}", r.a, outcome_name(r.b));
    case What::kAbort:
      return fmt::format("engine aborts transfer {}", r.a);
    case What::kKill:
      return fmt::format("FAULT incarnation {} dies", r.a);
    case What::kStart:
      return fmt::format("starts as incarnation {}", r.a);
    case What::kFreeze:
      return fmt::format("FAULT frozen for {} us", r.a);
    case What::kCut:
      return fmt::format("FAULT cut towards node {} for {} us", r.a, r.b);
    case What::kArrive:
      return fmt::format("request {} arrives ({})", r.a, name_of(kPlans, r.b));
    case What::kLeg:
      return fmt::format("request {}: {} leg starts here", r.a, name_of(kLegs, r.b));
    case What::kLegToken:
      return fmt::format("request {}: token {}", r.a, r.b);
    case What::kLegEnd:
      return fmt::format("request {}: a leg here ends: {}", r.a, outcome_name(r.b));
    case What::kCancel:
      return fmt::format("request {}: its client leaves", r.a);
    case What::kRetry:
      return fmt::format("request {}: once more", r.a);
    case What::kReplay:
      return fmt::format("request {}: its second leg comes again", r.a);
    case What::kEnd:
      return fmt::format("request {} ends: {}", r.a, outcome_name(r.b));
    case What::kQuiet:
      return "the load is over, faults end";
  }
  return "?";
}

std::string Trace::text(int64_t count) const {
  std::string text;
  const int64_t first = count == 0 ? 0 : std::max<int64_t>(0, size() - count);
  for (int64_t i = first; i < size(); ++i) {
    const Record& record = records_[static_cast<size_t>(i)];
    const std::string node = record.node < 0 ? "-" : fmt::format("{}", record.node);
    text += fmt::format("{:12.6f} s  node {:>2}  {}\n", static_cast<double>(record.at_us) * 1e-6, node, line(record));
  }
  return text;
}

}  // namespace tandem::sim
