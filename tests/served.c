/* Continues texts with a SavedModel, through TensorFlow's C API as TensorFlow Serving does: there is no Python here.
 *
 *     served DIRECTORY INPUT OUTPUT TEXT...
 *
 * INPUT and OUTPUT are operations of the graph, OUTPUT with the number of its result: name:number. All texts are one
 * request. Prints each continuation with a NUL behind it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

static void check(TF_Status *status) {
    if (TF_GetCode(status) == TF_OK) return;
    fprintf(stderr, "%s\n", TF_Message(status));
    exit(1);
}

static TF_Tensor *texts_of(int count, char **texts) {
    int64_t shape[1] = {count};
    TF_Tensor *tensor = TF_AllocateTensor(TF_STRING, shape, 1, count * sizeof(TF_TString));
    TF_TString *strings = TF_TensorData(tensor);
    for (int i = 0; i < count; i++) {
        TF_StringInit(&strings[i]);
        TF_StringCopy(&strings[i], texts[i], strlen(texts[i]));
    }
    return tensor;
}

int main(int argc, char **argv) {
    const char *tags[] = {"serve"};
    TF_Status *status = TF_NewStatus();
    TF_Graph *graph = TF_NewGraph();
    TF_SessionOptions *options = TF_NewSessionOptions();
    TF_Session *session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
    check(status);

    char *number = strchr(argv[3], ':');
    *number++ = 0;
    TF_Output input = {TF_GraphOperationByName(graph, argv[2]), 0};
    TF_Output output = {TF_GraphOperationByName(graph, argv[3]), atoi(number)};
    TF_Tensor *given = texts_of(argc - 4, argv + 4), *found = NULL;
    TF_SessionRun(session, NULL, &input, &given, 1, &output, &found, 1, NULL, 0, NULL, status);
    check(status);

    TF_TString *strings = TF_TensorData(found);
    for (int64_t i = 0; i < TF_Dim(found, 0); i++) {
        fwrite(TF_StringGetDataPointer(&strings[i]), 1, TF_StringGetSize(&strings[i]), stdout);
        fputc(0, stdout);
    }
    return 0;
}
