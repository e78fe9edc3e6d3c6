// Moves the channels of each group of a packed tensor to a word boundary: [pixels, words_for(groups *
// channels_per_group)] becomes [pixels, groups, words_for(channels_per_group)], tail bits of each group 0. The two
// layouts are the same when groups == 1 or channels_per_group % 64 == 0; grouped convolutions of other widths read the
// aligned form.
#pragma once

#include "core/layout.h"
#include "core/status.h"

namespace lowbit {

struct AlignGroupsArgs {
  const uint64_t* words;
  int64_t pixels;
  int64_t groups;
  int64_t channels_per_group;
  uint64_t* output;
};

}  // namespace lowbit
