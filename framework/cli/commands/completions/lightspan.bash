# Completion of `lightspan` in bash 4.4 or newer: source <(lightspan completion bash)
_lightspan() {
    local answer words line="${COMP_LINE:0:COMP_POINT}"
    read -ra words <<<"$line" # COMP_WORDS would be cut at every `=`
    [[ $line == *[[:space:]] ]] && words+=("")
    mapfile -t answer < <("$1" completion bash --words "${words[@]:1}" 2>/dev/null)
    COMPREPLY=("${answer[@]:1}")
    case "${answer[0]}" in
        files) compopt -o default ;;
        folders) compopt -o dirnames ;;
    esac
    [[ ${COMPREPLY[0]} == *[.=] ]] && compopt -o nospace
    return 0
}
complete -F _lightspan lightspan
