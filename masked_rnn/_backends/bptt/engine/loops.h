// The loops for one kind of CPU. A thread takes a block of sequences of one direction through all steps.
#pragma once

#include "backward.h"
#include "cells.h"
#include "forward.h"
#include "layer.h"
#include "level.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

inline Fault forward(const Forward& record) {
    return record.layer.item_bytes == 4 ? ForwardPass<float>(record)() : ForwardPass<double>(record)();
}

inline Fault backward(const Backward& record) {
    return record.layer.item_bytes == 4 ? BackwardPass<float>(record)() : BackwardPass<double>(record)();
}

extern const Loops LOOPS;
const Loops LOOPS = {table_of, forward, backward};

}  // namespace masked_rnn::LEVEL
LEVEL_END
