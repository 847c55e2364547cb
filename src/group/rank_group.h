// What an engine sees of the group that its rank belongs to. Membership (this folder) is the real one.
#pragma once

#include "src/base/result.h"
#include "src/comm/bell.h"
#include "src/group/fabric.h"

namespace tandem::group {

class RankGroup {
 public:
  virtual ~RankGroup() = default;
  virtual RankId rank() const = 0;
  virtual int32_t size() const = 0;

  // The one thing that the engine thread sleeps on: rung by its own process, by peers that signal, and when the group
  // forms or breaks.
  virtual comm::Bell& bell() = 0;
  // The fabric of the epoch that stands, or null. A new epoch has a new one; the old one lives until the next call,
  // which belongs to the engine thread.
  virtual Fabric* fabric() = 0;
  // This rank's step failed in `epoch`, which ends for all; ignored if it has ended already.
  virtual void report(Epoch epoch, const Error& why) = 0;
  // Why the group does not stand, for users; ok while it does. From any thread.
  virtual Status status() const = 0;
};

}  // namespace tandem::group
