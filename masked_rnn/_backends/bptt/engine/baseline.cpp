// Any CPU: level.h has what its loops are compiled for.
#include "loops.h"
