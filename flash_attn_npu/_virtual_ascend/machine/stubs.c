/* What torch_npu needs of CANN to load and run its operator adapters to their end on a machine
 * without an NPU: device memory is host memory, streams and events are always complete, operators
 * compute nothing. Only CANN entry points live here; arithmetic is Python's business.
 * operators.inc, generated from the installed wheel, names the aclnn operators it may look up. */
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ALIGNMENT 512
#define LARGEST_MEMORY ((size_t)64 << 30)
#define OUT_OF_MEMORY 207001 /* ACL_ERROR_RT_MEMORY_ALLOCATION */

static char handle;
static __thread int32_t current_device;
static size_t taken; /* bytes of the device that are allocated */

static int allocate(void **pointer, size_t size) {
    size_t rounded = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *pointer = aligned_alloc(ALIGNMENT, rounded ? rounded : ALIGNMENT);
    return *pointer ? 0 : OUT_OF_MEMORY;
}

/* VIRTUAL_ASCEND_MEMORY in bytes, or half of what the host has, or its container may use: whoever
 * asks a card for its size and takes most of it must not take the host's last byte. */
static size_t memory_total(void) {
    const char *told = getenv("VIRTUAL_ASCEND_MEMORY");
    if (told && *told) return strtoull(told, NULL, 10);
    size_t total = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    unsigned long long limit;
    FILE *file = fopen("/sys/fs/cgroup/memory.max", "r");
    if (file && fscanf(file, "%llu", &limit) == 1 && limit < total) total = limit;
    if (file) fclose(file);
    return total / 2 < LARGEST_MEMORY ? total / 2 : LARGEST_MEMORY;
}

static int allocate_device(void **pointer, size_t size) {
    if (__atomic_load_n(&taken, __ATOMIC_RELAXED) + size > memory_total()) return OUT_OF_MEMORY;
    int failed = allocate(pointer, size);
    if (!failed) __atomic_fetch_add(&taken, malloc_usable_size(*pointer), __ATOMIC_RELAXED);
    return failed;
}

static int new_handle(void **out) {
    *out = &handle;
    return 0;
}

/* Devices */
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
int aclrtSetDevice(int32_t device) { current_device = device; return 0; }
int aclrtGetDevice(int32_t *device) { *device = current_device; return 0; }
int aclrtGetCurrentContext(void **context) { return new_handle(context); }
const char *aclrtGetSocName(void) {
    const char *name = getenv("VIRTUAL_ASCEND_SOC");
    return name && *name ? name : "Ascend910B3";
}
const char *aclGetRecentErrMsg(void) { return ""; }
int aclrtGetSysParamOpt(int option, int64_t *value) { (void)option; *value = 0; return 0; }
int aclGetDeviceCapability(uint32_t device, int info, int64_t *value) {
    (void)device; (void)info; *value = 20; return 0;
}
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    (void)device;
    if (flags) *flags = 0;
    *active = 1;
    return 0;
}

/* Memory */
int aclrtMalloc(void **pointer, size_t size, int policy) {
    (void)policy; return allocate_device(pointer, size);
}
int aclrtMallocAlign32(void **pointer, size_t size, int policy) {
    (void)policy; return allocate_device(pointer, size);
}
int aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size); }
int aclrtMallocHostWithCfg(void **pointer, uint64_t size, void *config) {
    (void)config; return allocate(pointer, size);
}
int aclrtFree(void *pointer) {
    __atomic_fetch_sub(&taken, malloc_usable_size(pointer), __ATOMIC_RELAXED);
    free(pointer);
    return 0;
}
int aclrtFreeHost(void *pointer) { free(pointer); return 0; }
int aclrtGetMemInfo(int attribute, size_t *available, size_t *total) {
    (void)attribute;
    size_t used = __atomic_load_n(&taken, __ATOMIC_RELAXED);
    *total = memory_total();
    *available = used < *total ? *total - used : 0;
    return 0;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t count, int kind) {
    (void)room; (void)kind; memmove(to, from, count); return 0;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t count, int kind,
                     void *stream) {
    (void)stream; return aclrtMemcpy(to, room, from, count, kind);
}
int aclrtMemset(void *pointer, size_t room, int32_t value, size_t count) {
    (void)room; memset(pointer, value, count); return 0;
}
int aclrtMemsetAsync(void *pointer, size_t room, int32_t value, size_t count, void *stream) {
    (void)stream; return aclrtMemset(pointer, room, value, count);
}

/* Streams and events */
int aclrtCreateStream(void **stream) { return new_handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) {
    (void)priority; (void)flag; return new_handle(stream);
}
int aclrtStreamQuery(void *stream, int *status) { (void)stream; *status = 0; return 0; }
int aclrtStreamGetId(void *stream, int32_t *id) { (void)stream; *id = 0; return 0; }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { (void)flag; return new_handle(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) {
    (void)flag; return new_handle(event);
}
int aclrtQueryEventStatus(void *event, int *status) { (void)event; *status = 1; return 0; }
int aclrtQueryEventWaitStatus(void *event, int *status) { (void)event; *status = 0; return 0; }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    (void)start; (void)end; *milliseconds = 0; return 0;
}

/* Argument objects of the operators: opaque, never read back */
#define HANDLE(name) void *name(void) { return &handle; }
HANDLE(aclCreateTensor) HANDLE(aclCreateScalar) HANDLE(aclCreateIntArray)
HANDLE(aclCreateBoolArray) HANDLE(aclCreateFloatArray) HANDLE(aclCreateTensorList)
HANDLE(aclCreateScalarList) HANDLE(aclCreateDataBuffer) HANDLE(aclCreateTensorDesc)
HANDLE(aclopCreateAttr)

/* Everything else succeeds and does nothing */
#define ZERO(name) int name(void) { return 0; }
ZERO(aclDestroyTensor) ZERO(aclDestroyScalar) ZERO(aclDestroyIntArray) ZERO(aclDestroyBoolArray)
ZERO(aclDestroyFloatArray) ZERO(aclDestroyTensorList) ZERO(aclDestroyScalarList)
ZERO(aclDestroyDataBuffer) ZERO(aclDestroyTensorDesc) ZERO(aclDestroyAclOpExecutor)
ZERO(InitHugeMemThreadLocal) ZERO(UnInitHugeMemThreadLocal) ZERO(ReleaseHugeMem)
ZERO(MsprofGetHashId) ZERO(MsprofRegisterCallback) ZERO(MsprofReportAdditionalInfo)
ZERO(MsprofReportApi) ZERO(MsprofReportCompactInfo) ZERO(MsprofSysCycleTime)
ZERO(aclAppLog) ZERO(aclInit) ZERO(aclFinalize) ZERO(aclSetCompileopt)
ZERO(aclGetTensorDescDimV2) ZERO(aclGetTensorDescFormat) ZERO(aclGetTensorDescNumDims)
ZERO(aclGetTensorDescType) ZERO(aclSetTensorDescName) ZERO(aclSetTensorFormat)
ZERO(aclSetTensorPlaceMent) ZERO(aclSetTensorShape)
ZERO(aclmdlInitDump) ZERO(aclmdlSetDump) ZERO(aclmdlFinalizeDump)
ZERO(aclopCompileAndExecute) ZERO(aclopCompileAndExecuteV2) ZERO(aclopDestroyAttr)
ZERO(aclopSetAttrBool) ZERO(aclopSetAttrDataType) ZERO(aclopSetAttrFloat) ZERO(aclopSetAttrInt)
ZERO(aclopSetAttrListBool) ZERO(aclopSetAttrListFloat) ZERO(aclopSetAttrListInt)
ZERO(aclopSetAttrListListInt) ZERO(aclopSetAttrString)
ZERO(aclrtBinaryGetFunction) ZERO(aclrtBinaryLoadFromData) ZERO(aclrtGetFunctionAddr)
ZERO(aclrtCtxSetSysParamOpt) ZERO(aclrtSetSysParamOpt) ZERO(aclrtSetDeviceSatMode)
ZERO(aclrtSetOpExecuteTimeOut) ZERO(aclrtSetOpWaitTimeout)
ZERO(aclrtSetCurrentContext) ZERO(aclrtResetDevice)
ZERO(aclrtDeviceCanAccessPeer) ZERO(aclrtDeviceEnablePeerAccess) ZERO(aclrtDeviceGetBareTgid)
ZERO(aclrtDestroyStream) ZERO(aclrtDestroyStreamForce) ZERO(aclrtSynchronizeStream)
ZERO(aclrtSynchronizeStreamWithTimeout) ZERO(aclrtSynchronizeDevice)
ZERO(aclrtSynchronizeDeviceWithTimeout) ZERO(aclrtStreamWaitEvent)
ZERO(aclrtDestroyEvent) ZERO(aclrtRecordEvent) ZERO(aclrtResetEvent) ZERO(aclrtSynchronizeEvent)
ZERO(aclrtProcessReport) ZERO(aclrtGetLastError) ZERO(aclrtPeekAtLastError)
ZERO(aclrtMallocPhysical) ZERO(aclrtFreePhysical) ZERO(aclrtMapMem) ZERO(aclrtUnmapMem)
ZERO(aclrtReserveMemAddress) ZERO(aclrtReleaseMemAddress)
ZERO(aclrtMemExportToShareableHandle) ZERO(aclrtMemImportFromShareableHandle)
ZERO(aclrtMemSetPidToShareableHandle)
ZERO(rtDevBinaryRegister) ZERO(rtFunctionRegister) ZERO(rtGetC2cCtrlAddr) ZERO(rtKernelLaunch)

/* torch_npu 2.6 and 2.8 link these: collectives, and the graph engine's registration of operators,
 * which creates none */
ZERO(HcclAllGather) ZERO(HcclAllReduce) ZERO(HcclBroadcast) ZERO(HcclReduceScatter)
ZERO(HcclSend) ZERO(HcclRecv) ZERO(HcclCommDestroy) ZERO(HcclCommInitAll)
ZERO(HcclCommInitRootInfo) ZERO(HcclGetRootInfo)
ZERO(_ZN2ge12AscendStringC1EPKc) ZERO(_ZN2ge8OperatorC2EPKcS2_)
ZERO(_ZN2ge8OperatorC2ERKNS_12AscendStringES3_)
ZERO(_ZN2ge23OperatorCreatorRegisterC1EPKcRKSt8functionIFNS_8OperatorERKNS_12AscendStringEEE)
ZERO(_ZN2ge8Operator12AttrRegisterEPKcb) ZERO(_ZN2ge8Operator12AttrRegisterEPKcl)
ZERO(_ZN2ge8Operator13InputRegisterEPKc) ZERO(_ZN2ge8Operator14OutputRegisterEPKc)
ZERO(_ZN2ge8Operator20DynamicInputRegisterEPKcjb)
ZERO(_ZN2ge8Operator20RequiredAttrRegisterEPKc)
ZERO(_ZN2ge8Operator27DynamicInputRegisterByIndexEPKcjm)

/* The ATB plugin links against C++ names */
ZERO(_ZN3atb13CreateContextEPPNS_7ContextE) ZERO(_ZN3atb14DestroyContextEPNS_7ContextE)
ZERO(_ZN3atb16DestroyOperationEPNS_9OperationE) ZERO(_ZN3atb5Utils13GetTensorSizeERKNS_6TensorE)
#define ATB_OPERATION(name) ZERO(_ZN3atb15CreateOperationINS_5infer##name##EEEiRKT_PPNS_9OperationE)
ATB_OPERATION(11LinearParam) ATB_OPERATION(12ElewiseParam) ATB_OPERATION(12RmsNormParam)
ATB_OPERATION(14GroupTopkParam) ATB_OPERATION(18SelfAttentionParam)
ATB_OPERATION(19PagedAttentionParam) ATB_OPERATION(20ReshapeAndCacheParam)
ATB_OPERATION(9RopeParam)

#define OPERATOR(name) ZERO(name) ZERO(name##GetWorkspaceSize)
#include "operators.inc"
