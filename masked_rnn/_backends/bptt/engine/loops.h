// The loops for one kind of CPU. A thread takes a block of sequences of one direction through all steps.
#pragma once

#include "backward.h"
#include "cells.h"
#include "forward.h"
#include "layer.h"
#include "level.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

inline Fault forward(const Forward& run) {
    return run.layer.item_bytes == 4 ? ForwardPass<float>(run)() : ForwardPass<double>(run)();
}

inline Fault backward(const Backward& run) {
    return run.layer.item_bytes == 4 ? BackwardPass<float>(run)() : BackwardPass<double>(run)();
}

extern const Loops LOOPS;
const Loops LOOPS = {table_of, forward, backward};

}  // namespace masked_rnn::LEVEL
LEVEL_END
