/* Receives NVTX events in place of a profiler: NVTX loads the library that NVTX_INJECTION64_PATH names. Each event is
 * a line of the file NVTX_LOG: the thread's id, the event, the domain, its text and "registered" or "plain". */
#define _GNU_SOURCE
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static FILE *events;

/* A handle is a pointer to the tool's own copy of the text: domain names and registered strings. */
static char *keep(const char *text) { return strdup(text); }

static void write_event(const char *event, nvtxDomainHandle_t domain, const char *text, const char *kind) {
  /* One call a line, which stdio makes atomic among threads. */
  fprintf(events, "%ld\t%s\t%s\t%s\t%s\n", syscall(SYS_gettid), event, domain ? (const char *)domain : "", text, kind);
  fflush(events);
}

static void write_message(const char *event, nvtxDomainHandle_t domain, const nvtxEventAttributes_t *attributes) {
  if (attributes->messageType == NVTX_MESSAGE_TYPE_REGISTERED)
    write_event(event, domain, (const char *)attributes->message.registered, "registered");
  else if (attributes->messageType == NVTX_MESSAGE_TYPE_ASCII)
    write_event(event, domain, attributes->message.ascii, "plain");
  else
    write_event(event, domain, "", "none");
}

static nvtxDomainHandle_t NVTX_API create_domain(const char *name) { return (nvtxDomainHandle_t)keep(name); }

static nvtxStringHandle_t NVTX_API register_string(nvtxDomainHandle_t domain, const char *text) {
  (void)domain;
  return (nvtxStringHandle_t)keep(text);
}

static int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t *attributes) {
  write_message("push", domain, attributes);
  return 0;
}

static int NVTX_API pop(nvtxDomainHandle_t domain) {
  write_event("pop", domain, "", "");
  return 0;
}

static nvtxRangeId_t NVTX_API start(nvtxDomainHandle_t domain, const nvtxEventAttributes_t *attributes) {
  write_message("start", domain, attributes);
  return 0;
}

static void NVTX_API mark(nvtxDomainHandle_t domain, const nvtxEventAttributes_t *attributes) {
  write_message("mark", domain, attributes);
}

int NVTX_API InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
  const NvtxExportTableCallbacks *callbacks = get_table(NVTX_ETID_CALLBACKS);
  NvtxFunctionTable table;
  unsigned int size;
  events = fopen(getenv("NVTX_LOG"), "a");
  if (!events || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)create_domain;
  *table[NVTX_CBID_CORE2_DomainRegisterStringA] = (NvtxFunctionPointer)register_string;
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)push;
  *table[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)pop;
  *table[NVTX_CBID_CORE2_DomainRangeStartEx] = (NvtxFunctionPointer)start;
  *table[NVTX_CBID_CORE2_DomainMarkEx] = (NvtxFunctionPointer)mark;
  return 1;
}
