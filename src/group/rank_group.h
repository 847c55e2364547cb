// What an engine sees of the group that its rank belongs to. Membership (this folder) is the real one.
#pragma once

#include <optional>

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
  // Engine thread only. The fabric of the epoch that stands now, or null. Another pointer for each epoch; the fabric of
  // an epoch that has ended is destroyed by the next call, and no new epoch stands before that.
  virtual Fabric* fabric() = 0;
  // Engine thread only. A call of the fabric failed, or this rank's step did: the epoch ends for all ranks. The fabric
  // stays, failing, until the next call of fabric(). `suspect`: the rank that is to blame, if known. Without an epoch it
  // does nothing.
  virtual void report(const Error& why, std::optional<RankId> suspect) = 0;
  // Why the group does not stand, for users; ok while it does. From any thread.
  virtual Status status() const = 0;
};

}  // namespace tandem::group
